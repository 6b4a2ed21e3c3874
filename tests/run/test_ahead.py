"""Micro-batches reach the device in order, one ahead of the work there."""

import pytest
import torch
from torch import nn

from mug.data.errors import DataError
from mug.run.cluster import hardware
from mug.run.cluster.ahead import Ahead
from mug.run.training.step import train_step

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]


class Sum(nn.Module):
    """Its loss is a sum over the batch, times its weight."""

    active = ("sum",)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), device=hardware.device()))

    def prepare(self, batch):
        return batch

    def counts(self, batch):
        return {"sum": len(batch["x"])}

    def forward(self, batch):
        assert batch["x"].device == hardware.device()
        return {"sum": self.weight * batch["x"].sum()}, {}


class Engine:
    """Writes down what happens in which order."""

    def __init__(self):
        self.module, self.events, self.losses = Sum(), [], []

    def fetch(self, steps, end=None):
        for step in steps:
            self.events.append(f"fetch {step[0]}")
            yield [{"x": torch.full((1 << 20,), number)} for number in step]
        if end:
            raise end

    def __call__(self, batch):
        losses, report = self.module(batch)
        self.losses.append(losses["sum"].detach())
        self.events.append("forward")
        return losses, report

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.events.append("step")

    def means(self):
        return [loss.item() / (1 << 20) for loss in self.losses]


def test_the_next_step_is_fetched_before_the_engine_may_wait_for_the_device():
    engine = Engine()
    ahead = Ahead(engine.fetch([(0.0, 1.0), (2.0, 3.0), (4.0, 5.0)]))
    for _ in range(3):
        train_step(engine, ahead.next_step(), {"sum": 1.0}, ahead)
    assert engine.means() == [0, 1, 2, 3, 4, 5]
    one_step = ["forward", "step", "forward"]
    assert engine.events == [
        *("fetch 0.0", *one_step, "fetch 2.0", "step"),
        *(*one_step, "fetch 4.0", "step"),
        *(*one_step, "step"),
    ]
    assert ahead.next_step() == []


def test_a_step_that_cannot_be_fetched_is_raised_when_it_is_asked_for():
    engine = Engine()
    ahead = Ahead(engine.fetch([(1.0, 2.0)], end=DataError("shard 7 is gone")))
    train_step(engine, ahead.next_step(), {"sum": 1.0}, ahead)
    assert engine.means() == [1, 2] and engine.events[-1] == "step"
    with pytest.raises(DataError, match="shard 7 is gone"):
        ahead.next_step()


def test_a_batch_that_was_not_sent_ahead_is_not_mistaken_for_the_one_that_was():
    engine = Engine()
    first, second, other = ({"x": torch.full((1 << 20,), float(number))} for number in range(3))
    ahead = Ahead()
    ahead.send([first])
    assert ahead.take(second)["x"].mean() == 1
    ahead.send([first])
    train_step(engine, [other], {"sum": 1.0}, ahead)
    assert engine.means() == [2]


def test_copies_that_follow_each_other_keep_their_values():
    ahead, sums = Ahead(), []
    for number in range(20):
        batch = {"x": torch.full((1 << 20,), float(number))}
        ahead.send([batch])
        sums.append(ahead.take(batch)["x"].double().mean())
    assert [value.item() for value in sums] == list(range(20))
