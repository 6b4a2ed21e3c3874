"""The linear probe against scikit-learn's logistic regression on the same features."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mug.run import linear_probe
from mug.run.common.errors import RunError
from mug.run.evaluators.linear_probe import ProbeConfig, _schedule, train_probe


def features(seed: int, count: int, classes: int = 4, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes, far from the origin and on scales from 0.01 to 100."""
    random, world = np.random.default_rng(seed), np.random.default_rng(0)
    centres = world.normal(size=(classes, width))
    scale, shift = 10.0 ** world.uniform(-2, 2, width), world.normal(size=width)
    labels = random.integers(classes, size=count)
    x = (centres[labels] + 1.5 * random.normal(size=(count, width)) + 3 * shift) * scale
    return torch.tensor(x, dtype=torch.float32), torch.tensor(labels)


def accuracy(probe: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.inference_mode():
        return (probe(x).argmax(1) == labels).double().mean().item()


@pytest.fixture(scope="module")
def data():
    return *features(1, 3000), *features(2, 4000)


def test_within_half_a_point_of_logistic_regression(data):
    train, labels, test, test_labels = data
    scaler = StandardScaler().fit(train)
    oracle = LogisticRegression(C=np.inf, max_iter=2000).fit(scaler.transform(train), labels)
    expected = oracle.score(scaler.transform(test), test_labels)
    ours = accuracy(train_probe(train, labels, 4, ProbeConfig(), seed=0), test, test_labels)
    assert 0.6 < expected < 0.95, "neither chance nor trivial"
    assert abs(ours - expected) < 0.005


def test_a_seed_gives_one_probe(data):
    train, labels, *_ = data
    config = ProbeConfig(epochs=2, warmup_epochs=1)
    first, again, other = (train_probe(train, labels, 4, config, seed)[1].weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_matrix_starts_with_the_step_of_lars(data):
    """One update from rest: lr · 0.001 · |w| along the gradient, for a batch of all images."""
    train, labels, *_ = data
    torch.manual_seed(0)
    config = ProbeConfig(epochs=1, warmup_epochs=0, batch=len(train), learning_rate=2.0)
    from mug.run.evaluators.linear_probe import build_probe

    with torch.random.fork_rng():
        torch.manual_seed(7)
        before = build_probe(train.shape[1], 4)[1].weight
    after = train_probe(train, labels, 4, config, seed=7)[1].weight
    step = (after - before).norm().item()
    assert step == pytest.approx(2.0 * 0.001 * before.norm().item(), rel=1e-3)


def test_no_batch_is_too_small_for_its_norm(data):
    """Batches of 2 of an odd number of images would leave one alone."""
    train, labels, *_ = data
    for images in (2, 3, 5):
        probe = train_probe(train[:images], labels[:images], 4, ProbeConfig(epochs=1, batch=2), seed=0)
        assert probe[1].weight.isfinite().all()


def test_batch_makes_maes_number_of_updates():
    config = ProbeConfig()
    assert config.batch_for(1_281_167) == 16384 and config.batch_for(60_000) == 770 and config.batch_for(40) == 32
    assert ProbeConfig(batch=500).batch_for(60_000) == 500


def test_learning_rate_warms_up_then_falls_to_zero():
    config = ProbeConfig()
    assert [_schedule(epoch, config) for epoch in (0, 5, 10, 50, 90)] == pytest.approx([0, 0.5, 1, 0.5, 0])


BASIC = ["run", "--data", "openmoji"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*BASIC, "--epochs", "0"], "--epochs must be at least 1"),
        ([*BASIC, "--probe_batch", "1"], "--probe_batch must be at least 2"),
        ([*BASIC, "--learning_rate", "0"], "--learning_rate must be more than 0"),
        ([*BASIC, "--seeds", "0"], "--seeds must lie between"),
        ([*BASIC, "--epoch", "3"], "--epoch"),
    ],
    ids=["no epochs", "batch of one", "no learning rate", "no seeds", "abbreviated flag"],
)
def test_a_mistake_on_the_command_line_is_named(arguments, message):
    with pytest.raises(RunError) as refused:
        linear_probe.parse(arguments)
    assert message in str(refused.value) and "\n" not in str(refused.value)
