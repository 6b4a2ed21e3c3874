"""bf16 as DeepSpeed makes it: parameters are cast, buffers stay fp32."""

import copy

import pytest
import torch
from torch import nn

from mug.model.activation_checkpointing import activation_checkpointing as set_policy
from mug.model.generate import write
from mug.model.objectives.classify import Classify, ClassifyConfig
from mug.model.objectives.objective import Context
from mug.model.presets import resolve
from mug.model.text_decoder import TextBlock
from mug.model.vit import Block


@torch.no_grad()
def cast(model: nn.Module) -> nn.Module:
    """The model, as the engine makes it, with each block checked to work on bf16 throughout."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    for module in model.modules():
        if isinstance(module, (Block, TextBlock, nn.LayerNorm, nn.Linear)):
            module.register_forward_hook(check)
    return model


def check(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    assert inputs[0].dtype == output.dtype == torch.bfloat16, type(module)


def gradients(model: nn.Module, batch: dict) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    losses, _ = model(batch)
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    values = {name: loss.item() for name, loss in losses.items()}
    return values, {name: p.grad.float().flatten() for name, p in model.named_parameters()}


def compare(exact: nn.Module, batch: dict) -> None:
    """Losses within 2%, and gradients that point the same way."""
    expected, truth = gradients(exact, batch)
    exact.zero_grad()
    losses, rounded = gradients(cast(copy.deepcopy(exact)), batch)
    assert losses == pytest.approx(expected, rel=2e-2)
    flat, flat_truth = (torch.cat([values[name] for name in truth]) for values in (rounded, truth))
    assert torch.cosine_similarity(flat, flat_truth, dim=0) > 0.99


@pytest.mark.parametrize("activation_checkpointing", ["none", "elementwise", "blocks"])
@pytest.mark.parametrize("captioning", ["autoregressive", "masked-language"])
def test_mug(make_model, make_batch, captioning, activation_checkpointing):
    model = make_model(captioning=captioning)
    set_policy(model, activation_checkpointing)
    compare(model, make_batch(model, [6, 3, None, 1]))


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_classifier(make_model, make_batch, pool):
    mug = make_model()
    sizes = {name: getattr(mug.config, name) for name in ("image_size", "patch_size", "width", "depth", "heads")}
    torch.manual_seed(0)
    model = Classify(resolve(ClassifyConfig(**sizes, pool=pool, drop_path=0.3)), Context(class_names=tuple("abcde")))
    nn.init.normal_(model.head.weight, std=0.1)
    batch = make_batch(mug, [1, 1, 1, 1])
    compare(model, {**batch, "target": torch.eye(5)[:4]})


@torch.no_grad()
def test_captions_and_reconstructions(make_model, make_batch):
    exact = make_model()
    batch = make_batch(exact, [4, 2])
    model = cast(copy.deepcopy(exact))
    memory_BLD = model.encoder(batch["image"])
    parts = model.text_decoder, model.vocabulary, memory_BLD
    for tokens_BT in (write(*parts), write(*parts, beams=2)):
        assert tokens_BT.shape == (2, model.config.text_length) and (tokens_BT[:, 0] == model.vocabulary.bos).all()
    painted, truth = (m.reconstruct(batch["image"], batch["position"])[1].int() for m in (model, exact))
    assert (painted - truth).abs().max() <= 3 < (truth - batch["image"]).abs().max()
