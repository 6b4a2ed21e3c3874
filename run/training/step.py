"""One optimizer step: forward and backward of this rank's micro-batches, group by group."""

from collections.abc import Mapping
from typing import Any

from mug.data.kinds.samples import Batch
from mug.model.objectives.objective import CoupledObjective
from mug.run.cluster.ahead import Ahead
from mug.run.cluster.coupled import WeightedBatch, couple, prepare
from mug.run.cluster.losses import WeightedMeans, loss_scales
from mug.run.training.stale_gradients import clear_gradients, collect_gradients


def train_step(
    engine: Any,
    micro_batches: list[Batch],
    weights: Mapping[str, float],
    ahead: Ahead | None = None,
    groups: int = 1,
) -> WeightedMeans:
    """Do one optimizer step over this rank's micro-batches, of the steps of `ahead`; returns its metrics.

    groups: of equally many consecutive micro-batches, whose samples a coupled objective may let see each other.
    """
    objective, means, ahead = engine.module, WeightedMeans(), ahead or Ahead()
    batches = prepare(objective, micro_batches, groups)
    counts = [objective.counts(batch) for batch in batches]
    names = objective.active
    scales = [dict(zip(names, row, strict=True)) for row in loss_scales(counts, names)]
    size, done = len(batches) // groups, 0
    clear_gradients(engine)
    for first in range(0, len(batches), size):
        group = [WeightedBatch(batches[i], counts[i], scales[i]) for i in range(first, first + size)]
        if isinstance(objective, CoupledObjective) and (size > 1 or objective.draws(group[0].batch)):
            group = couple(engine, group, weights, ahead)
        for one in group:
            losses, metrics, total = one.forward(engine, ahead.take(one.batch), weights)
            engine.backward(total)
            done += 1
            ahead.send(batches[done:])  # before the engine's step, which may wait for the device
            if done == len(batches):
                collect_gradients(engine)
            engine.step()
            means.add(losses, metrics, one.counts)
    return means
