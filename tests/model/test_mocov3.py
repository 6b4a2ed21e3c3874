"""MoCo v3: its loss and every gradient in float64, the teacher, and the frozen projection of patches."""

import math

import pytest
import torch
from two_views import SIZES, assert_value_and_gradients, in_float64, tokens_of, unit, views_batch

from mug.model import flops
from mug.model.encoder import Encoder
from mug.model.objectives.mocov3 import MoCoV3, MoCoV3Config
from mug.model.objectives.objective import Context
from mug.model.presets import ModelConfigError, resolve
from mug.run.training.groups import parameter_groups
from mug.run.training.recipe import TrainerConfig


@pytest.fixture
def model() -> MoCoV3:
    """Its teacher lies apart from the student, as after some steps."""
    torch.manual_seed(0)
    model = MoCoV3(resolve(MoCoV3Config(**SIZES)), Context(seed=3))
    with torch.no_grad():
        for teacher in (model.teacher_encoder, model.teacher_projector):
            for parameter in teacher.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def cross_entropy(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Algorithm 1's `ctr`, row by row, at its temperature of 0.2: 2τ times the cross-entropy."""
    rows = [(keys @ query / 0.2).logsumexp(0) - keys[i] @ query / 0.2 for i, query in enumerate(queries)]
    return 2 * 0.2 * torch.stack(rows).mean()


def embedded(model: MoCoV3, batch: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Queries and keys of both views."""
    projections = [in_float64(model.projector, x) for x in tokens_of(model, model.encoder, batch)]
    with torch.no_grad():
        keys = [unit(in_float64(model.teacher_projector, x)) for x in tokens_of(model, model.teacher_encoder, batch)]
    return [unit(in_float64(model.predictor, z)) for z in projections], keys


def test_the_loss_and_every_gradient_are_algorithm_1(model):
    batch = views_batch()

    def expected():
        (q1, q2), (k1, k2) = embedded(model, batch)
        return cross_entropy(q1, k2) + cross_entropy(q2, k1)

    losses, metrics = model(batch)
    (q1, q2), (k1, k2) = embedded(model, batch)
    hits = [(q @ k.T).argmax(1) == torch.arange(12) for q, k in ((q1, k2), (q2, k1))]
    assert metrics["accuracy/views"].item() == pytest.approx(torch.cat(hits).double().mean().item())
    assert_value_and_gradients(model, losses["views"], expected)
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    patches = {"encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"}
    assert without == patches | {name for name, _ in model.named_parameters() if name.startswith("teacher_")}


def test_views_differ_in_blur_and_solarization(model):
    first, second = model.views(model.config)
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert first.jitter == second.jitter == (0.4, 0.4, 0.2, 0.1) and first.crop_scale == second.crop_scale


def test_patches_stay_as_drawn_in_a_group_without_rate_and_decay(model):
    groups = parameter_groups(model, TrainerConfig(weight_decay=0.1))
    still = [group for group in groups if group["lr_scale"] == 0]
    assert {id(p) for group in still for p in group["params"]} == {
        id(p) for p in model.encoder.patch_embed.parameters()
    }
    assert all(group["weight_decay"] == 0 for group in still)


def test_the_momentum_rises_along_a_cosine_and_a_teacher_adopts_an_encoder(model):
    for progress in (0, 0.3, 1):
        assert model.momentum_at(progress) == pytest.approx(1 - 0.01 * (1 + math.cos(math.pi * progress)) / 2)
    other = Encoder(model.config)
    model.adopt(other)
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], tensor)
        assert torch.equal(model.teacher_encoder.state_dict()[name], tensor)
    with pytest.raises(ModelConfigError, match=r"model\.momentum must be at least 0 and less than 1, not 1"):
        resolve(MoCoV3Config(momentum=1.0))


def test_random_outputs_are_at_the_level_of_chance():
    q, k = (unit(torch.randn(256, 4096, generator=torch.Generator().manual_seed(i))) for i in (0, 1))
    assert 2 * cross_entropy(q, k).item() == pytest.approx(0.8 * math.log(256), abs=0.02)


def test_counts_and_flop(model):
    assert model.counts(views_batch()) == {"views": 12}
    followed = flops.encoder(model.config) + 6 * (32 * 24 + 24 * 24 + 24 * 16)
    assert model.flops(views_batch()) == pytest.approx(24 * (followed * 4 / 3 + 6 * 2 * 24 * 16))
