"""SimSiam: its loss and stop-gradient in float64; training that collapses without it, and is reported."""

import pytest
import torch
from torch.nn.functional import cosine_similarity
from two_views import SIZES, assert_value_and_gradients, in_float64, tokens_of, unit, views_batch

from mug.model import flops
from mug.model.objectives.objective import Context
from mug.model.objectives.simsiam import SimSiam, SimSiamConfig
from mug.model.presets import resolve
from mug.run.training.collapse import CollapseAlarm
from mug.run.training.groups import parameter_groups
from mug.run.training.recipe import TrainerConfig

SIZES = SIZES | {"predictor_width": 8}


class Direct(SimSiam):
    """Without the stop-gradient."""

    @staticmethod
    def similarity(prediction_BE, projection_BE):
        return cosine_similarity(prediction_BE, projection_BE, dim=-1)


def make(kind: type[SimSiam] = SimSiam) -> SimSiam:
    torch.manual_seed(0)
    return kind(resolve(SimSiamConfig(**SIZES)), Context(seed=3))


def test_the_loss_and_every_gradient_are_equation_2():
    model, batch = make(), views_batch()

    def expected():
        z1, z2 = (in_float64(model.projector, x) for x in tokens_of(model, model.encoder, batch))
        p1, p2 = in_float64(model.predictor, z1), in_float64(model.predictor, z2)
        pairs = (p1, z2.detach()), (p2, z1.detach())
        return -sum((unit(p) * unit(z)).sum(1).mean() for p, z in pairs) / 2

    losses, metrics = model(batch)
    z = torch.cat([in_float64(model.projector, x) for x in tokens_of(model, model.encoder, batch)])
    assert metrics["std/views"].item() == pytest.approx(unit(z).std(0, correction=0).mean().item() * 4, rel=1e-4)
    assert_value_and_gradients(model, losses["views"], expected)


def test_the_predictor_alone_has_a_constant_rate():
    model = make()
    groups = parameter_groups(model, TrainerConfig())
    constant = {id(p) for group in groups if group["lr_constant"] for p in group["params"]}
    assert constant == {id(p) for p in model.predictor.parameters()}


def test_counts_and_flop():
    model, batch = make(), views_batch()
    assert model.counts(batch) == {"views": 12}
    heads = 6 * (32 * 24 + 24 * 24 + 24 * 16 + 2 * 16 * 8)
    assert model.flops(batch) == 24 * (flops.encoder(model.config) + heads)


def train(kind: type[SimSiam], steps: int = 100) -> tuple[list[float], list[tuple[int, str]]]:
    """The losses, and the warnings with their steps, of a training of which each 10th step is logged."""
    model, alarm, losses, warnings = make(kind), CollapseAlarm(), [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    batch = views_batch(samples=48)
    for step in range(1, steps + 1):
        batch["position"] = torch.arange(48) + 48 * step
        found, metrics = model(batch)
        optimizer.zero_grad()
        found["views"].backward()
        optimizer.step()
        losses.append(found["views"].item())
        if step % 10 == 0 and (line := alarm.check({name: value.item() for name, value in metrics.items()})):
            warnings.append((step, line))
    return losses, warnings


def test_a_collapse_is_reported_once_and_a_healthy_training_is_not():
    losses, warnings = train(Direct)
    assert losses[-1] < -0.8, "the loss falls all the same"
    assert len(warnings) == 1 and warnings[0][0] < 100
    assert warnings[0][1].startswith("the outputs have collapsed: ") and "views" in warnings[0][1]
    losses, warnings = train(SimSiam)
    assert losses[-1] < losses[0] - 0.2 and not warnings


def test_the_alarm_wants_three_logged_steps_in_a_row():
    alarm, low, fine = CollapseAlarm(), {"std/views": 0.1, "loss/views": -1.0}, {"std/views": 0.9, "rank/views": 5.0}
    assert [alarm.check(row) for row in (low, low, fine, low, {"rank/views": 1.5}, {"std/views": None})] == [None] * 6
    assert [alarm.check(low) for _ in range(2)] == [None, None]
    line = alarm.check({"std/views": 0.1, "rank/views": 1.5})
    assert "std/views 0.10 (floor 0.2), rank/views 1.50 (floor 2)" in line and "\n" not in line
    assert alarm.check(low) is None
