"""SimCLR: NT-Xent of pytorch-metric-learning and in float64, value and every gradient."""

import pytest
import torch
from two_views import SIZES, assert_value_and_gradients, in_float64, nt_xent, tokens_of, unit, views_batch

from mug.model import flops
from mug.model.heads import class_tokens
from mug.model.objectives.objective import Context
from mug.model.objectives.simclr import SimCLR, SimCLRConfig
from mug.model.presets import ModelConfigError, resolve


@pytest.fixture
def model() -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(resolve(SimCLRConfig(**SIZES)), Context(seed=3))


def test_the_loss_and_every_gradient_are_equation_1(model):
    batch = views_batch()
    losses, metrics = model(batch)

    def expected():
        return nt_xent(unit(in_float64(model.projector, torch.cat(tokens_of(model, model.encoder, batch)))), 0.1)

    assert_value_and_gradients(model, losses["views"], expected)
    views = unit(in_float64(model.projector, torch.cat(tokens_of(model, model.encoder, batch))))
    cosines = (views @ views.T).fill_diagonal_(-2)
    hits = cosines.argmax(1) == torch.arange(24).roll(12)
    assert metrics["accuracy/views"].item() == pytest.approx(hits.double().mean().item())
    assert metrics["std/views"].item() == pytest.approx(views.std(0, correction=0).mean().item() * 4, rel=1e-4)


def test_the_loss_is_that_of_pytorch_metric_learning(model):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    batch = views_batch()
    views = model.projector(torch.cat(class_tokens(model.encoder, model.images(batch))))
    expected = losses.NTXentLoss(temperature=0.1)(views, torch.arange(12).repeat(2))
    assert model(batch)[0]["views"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_order_of_samples_and_temperature(model):
    batch, order = views_batch(), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    loss = model(batch)[0]["views"].item()
    shuffled = {name: tensor[order] for name, tensor in batch.items()}
    assert model(shuffled)[0]["views"].item() == pytest.approx(loss, abs=1e-5)
    with pytest.raises(ModelConfigError, match=r"model\.temperature must be more than 0, not 0"):
        resolve(SimCLRConfig(temperature=0))


def test_counts_and_flop(model):
    batch, config = views_batch(), model.config
    assert model.counts(batch) == {"views": 12}
    head = 6 * (32 * 24 + 24 * 24 + 24 * 16)
    assert model.flops(batch) == 24 * (flops.encoder(config) + head)
    base = SimCLRConfig("base", projector_width=1, projection_width=1)
    assert 2 * flops.encoder(resolve(base)) / 1e9 == pytest.approx(210.8, abs=0.05)
