"""Losses that couple the samples of a group of several micro-batches, exactly, in two passes.

After GradCache (arXiv 2101.06983). First the features of all micro-batches, without gradient; on these the coupled
losses of the entire group, and their gradient by the features. Then each micro-batch again, with the surrogate
(features x their gradient).sum(), whose gradient by the encoder is that of the coupled losses; the last micro-batch
computes the coupled losses a second time, from the features kept, for the gradient of the heads and the scale. So
there is one backward pass a micro-batch, as DeepSpeed wants it, and memory for one micro-batch's activations. Between
the passes an objective may draw by the features, as it does hard negatives.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mug.model.batch_norm import statistics_kept
from mug.model.contrastive import gather
from mug.model.objectives.objective import Batch, CoupledObjective, Losses, Metrics, Objective
from mug.run.cluster import hardware
from mug.run.cluster.ahead import Ahead
from mug.run.cluster.losses import Counts, total_loss

Features = dict[str, Tensor]
Part = Callable[[CoupledObjective, Batch], tuple[Losses, Metrics, Tensor]]  # the tensor: what else to minimise


@dataclass(frozen=True)
class WeightedBatch:
    """A micro-batch on the host, and by each of its losses' names the terms it counts and the factor in the total."""

    batch: Batch
    counts: Counts
    scales: Mapping[str, Tensor]
    part: Part | None = None  # of the second pass

    def forward(self, engine: Any, batch: Batch, weights: Mapping[str, float]) -> tuple[Losses, Metrics, Tensor]:
        """(losses, metrics, total to take the gradient of); `batch` is its copy on the device."""
        if self.part is None:
            losses, metrics = engine(batch)
            return losses, metrics, total_loss(losses, weights, self.scales)
        losses, metrics, surrogate = engine(batch, self.part)
        return losses, metrics, surrogate + (total_loss(losses, weights, self.scales) if losses else 0)


def prepare(objective: Objective, batches: Sequence[Any], groups: int = 1) -> list[Any]:
    """Returns this rank's micro-batches, on the host, as the objective prepares them, with what it shares of a group.

    A collective call where it shares something. groups: of equally many consecutive micro-batches.
    """
    size = len(batches) // groups
    starts = range(0, len(batches), size)
    return [objective.prepare(one) for i in starts for one in _with_group(objective, batches[i : i + size])]


def _with_group(objective: Objective, group: Sequence[Batch]) -> Sequence[Batch]:
    """Returns the micro-batches with the shared tensors of all of them, on all ranks."""
    names = objective.shared(group[0]) if isinstance(objective, CoupledObjective) else ()
    if not names:
        return group
    mine = hardware.to_device({f"group/{name}": torch.cat([batch[name] for batch in group]) for name in names})
    of_all = {name: gather(tensor).cpu() for name, tensor in mine.items()}
    found = [copy.copy(batch) for batch in group]  # which keeps its kind
    for batch in found:
        batch.update(of_all)
    return found


def couple(
    engine: Any, group: Sequence[WeightedBatch], weights: Mapping[str, float], ahead: Ahead
) -> list[WeightedBatch]:
    """Run the first pass; returns this rank's micro-batches of a group as the second pass takes them.

    The losses of the last of them, its counts and its scales include the coupled losses of all.
    """
    features = _features(engine, group, ahead)
    if not features[0]:  # this kind of batch has no coupled loss
        return list(group)
    joined = {name: torch.cat([of[name] for of in features]) for name in features[0]}
    group = _drawn(engine, group, joined)
    learned = {name: tensor.requires_grad_() for name, tensor in joined.items() if tensor.is_floating_point()}
    # Not through the engine, which refuses other gradients than those of its backward.
    with statistics_kept(engine.module):
        losses, _ = engine.module(joined, _coupled_alone)
    last = _with_all(group, losses)
    total = total_loss(losses, weights, last.scales)
    gradients = torch.autograd.grad(total, list(learned.values()), allow_unused=True, materialize_grads=True)
    sizes = [len(next(iter(of.values()))) for of in features]
    of_each = zip(*(gradient.split(sizes) for gradient in gradients), strict=True)
    *firsts, of_last = (dict(zip(learned, parts, strict=True)) for parts in of_each)
    return [
        *(
            dataclasses.replace(one, counts=_less(one.counts, losses), part=_second_pass(of))
            for one, of in zip(group[:-1], firsts, strict=True)
        ),
        dataclasses.replace(last, part=_second_pass(of_last, {name: x.detach() for name, x in joined.items()})),
    ]


@torch.no_grad()
def held_out_losses(
    forward: Callable[..., Any], group: Iterable[tuple[Batch, Counts]]
) -> list[tuple[Losses, Metrics, Counts]]:
    """The losses of this rank's micro-batches of a group, on the device; those of the last include the coupled ones.

    forward: the objective, or the engine around it; all ranks call it equally often, with as many samples.
    """
    features, found = [], []
    for batch, counts in group:
        of_batch, losses, metrics = forward(batch, _without_coupled)
        features.append(of_batch)
        found.append((losses, metrics, counts))
    if not features[0]:
        return found
    joined = {name: torch.cat([of[name] for of in features]) for name in features[0]}
    coupled, coupled_metrics = forward(joined, _coupled_alone)
    totals = {name: sum(counts.get(name, 0) for _, _, counts in found) for name in coupled}
    losses, metrics, counts = found[-1]
    last = losses | coupled, metrics | coupled_metrics, {**counts, **totals}
    return [*((*of_batch[:2], _less(of_batch[2], coupled)) for of_batch in found[:-1]), last]


@torch.no_grad()
def _features(engine: Any, group: Sequence[WeightedBatch], ahead: Ahead) -> list[Features]:
    """Returns the features of each micro-batch."""
    found = []
    with statistics_kept(engine.module):
        for i, one in enumerate(group):
            found.append(engine.module(ahead.take(one.batch), _features_alone))
            ahead.send([(*group[i + 1 :], group[0])[0].batch])
    return found


@torch.no_grad()
def _drawn(engine: Any, group: Sequence[WeightedBatch], joined: Features) -> Sequence[WeightedBatch]:
    """Returns the micro-batches as their objective prepares them with what it draws by the group's features."""
    objective = engine.module
    if not objective.draws(group[0].batch):
        return group
    drawn = {name: tensor.cpu() for name, tensor in objective(joined, _draw).items()}
    sizes = [len(one.batch["position"]) for one in group]
    found = []
    for i, one in enumerate(group):
        batch = copy.copy(one.batch)  # which keeps its kind
        batch.update({name: tensor.split(sizes)[i] for name, tensor in drawn.items()})
        found.append(dataclasses.replace(one, batch=objective.prepare(batch)))
    return found


def _draw(objective: CoupledObjective, features: Features) -> dict[str, Tensor]:
    return objective.draw(features)


def _features_alone(objective: CoupledObjective, batch: Batch) -> Features:
    return objective.features(batch)[0]


def _without_coupled(objective: CoupledObjective, batch: Batch) -> tuple[Features, Losses, Metrics]:
    features, rest = objective.features(batch)
    return features, *objective.own_losses(batch, rest)


def _coupled_alone(objective: CoupledObjective, features: Features) -> tuple[Losses, Metrics]:
    return objective.coupled_losses(features)


def _second_pass(gradients: Features, group: Features | None = None) -> Part:
    """What a micro-batch computes: its own losses, the surrogate and, if it has the features of the group, the coupled
    losses of all."""

    def part(objective: CoupledObjective, batch: Batch) -> tuple[Losses, Metrics, Tensor]:
        features, rest = objective.features(batch)
        losses, metrics = objective.own_losses(batch, rest)
        surrogate = sum((features[name].float() * gradient.float()).sum() for name, gradient in gradients.items())
        if group is not None:
            coupled, coupled_metrics = objective.coupled_losses(group)
            losses, metrics = losses | coupled, metrics | coupled_metrics
        return losses, metrics, surrogate

    return part


def _less(counts: Counts, losses: Losses) -> Counts:
    """The counts without those of these losses."""
    return {name: count for name, count in counts.items() if name not in losses}


def _with_all(group: Sequence[WeightedBatch], losses: Losses) -> WeightedBatch:
    """The last micro-batch of the group, with the terms of these losses of all."""
    counts = {name: sum(one.counts.get(name, 0) for one in group) for name in losses}
    scales = {name: sum(one.scales[name] for one in group) for name in losses}
    last = group[-1]
    return dataclasses.replace(last, counts={**last.counts, **counts}, scales={**last.scales, **scales})
