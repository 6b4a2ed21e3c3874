"""Batches of two views, and float64 forms of what their objectives are made of; each objective's test has its loss."""

from collections.abc import Callable

import pytest
import torch
from plain import ENCODER
from torch import Tensor, nn

from mug.model.augment import augment_views
from mug.model.objectives.objective import Objective

SIZES = ENCODER | {"projector_width": 24, "projection_width": 16}


def views_batch(samples: int = 12, views: int = 2) -> dict[str, Tensor]:
    """Coloured squares, seen twice with noise."""
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(samples, 1, 3, 4, 4, generator=generator).repeat_interleave(8, 3).repeat_interleave(8, 4)
    noise = 0.3 * torch.randn(samples, views, 3, 32, 32, generator=generator)
    return {"views": ((image + noise).clamp(0, 1) * 255).to(torch.uint8), "position": torch.arange(samples) * 7}


def in_float64(head: nn.Sequential, x: Tensor) -> Tensor:
    """What a head of linear layers, batch norms and ReLU returns in training, in float64, written out."""
    for layer in head:
        if isinstance(layer, nn.Linear):
            x = x @ layer.weight.double().T
            x = x if layer.bias is None else x + layer.bias.double()
        elif isinstance(layer, nn.ReLU):
            x = x.clamp(min=0)
        else:
            x = (x - x.mean(0)) / (x.var(0, correction=0) + layer.eps).sqrt()
            x = x if layer.weight is None else x * layer.weight.double() + layer.bias.double()
    return x


def nt_xent(views: Tensor, temperature: float) -> Tensor:
    """SimCLR's equation 1, row by row, of unit vectors [2B, E] whose second half holds the other views."""
    total, B = 0, len(views) // 2
    for i in range(2 * B):
        logits = views @ views[i] / temperature
        others = [j for j in range(2 * B) if j != i]
        total = total - logits[(i + B) % (2 * B)] + logits[others].logsumexp(0)
    return total / (2 * B)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def tokens_of(model: Objective, encoder: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Class tokens of each view, float64, one view encoded after the other."""
    images = augment_views(batch["views"], model.views(model.config), model.context.seed, batch["position"])
    return [encoder(image)[:, 0].double() for image in images]


def assert_value_and_gradients(model: Objective, loss: Tensor, expected: Callable[[], Tensor]) -> None:
    """The loss and the gradient of every parameter are those of the float64 form."""
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    true = expected()
    true.backward()
    assert loss.item() == pytest.approx(true.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(
                found[name], parameter.grad, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert found[name].norm() > 0, f"{name} learns nothing"
