"""The objective's losses on held-out samples."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mug.data.held_out import HeldOutBatch, plan
from mug.data.kinds.samples import Batch, Samples
from mug.data.loader import load
from mug.data.stream import BatchShard
from mug.model.objectives.objective import CoupledObjective, Objective, name_of
from mug.run.cluster.ahead import Ahead
from mug.run.cluster.coupled import held_out_losses, prepare
from mug.run.cluster.losses import Counts, WeightedMeans
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import EvalConfig, Evaluator, Result, Subject

log = logging.getLogger("mug")


@dataclass(frozen=True)
class LossesConfig(EvalConfig):
    """Held-out losses, of `trainer.eval_samples` samples spread over the set."""


class HeldOutLosses(Evaluator):
    """Means over held-out samples, as in training: `loss/total`, `loss/NAME`, `accuracy/NAME`; of each stream where
    there are several, after its name and a slash.

    Losses that couple the samples of a group are computed on entire groups. A sample that cannot be used is replaced by
    another one of its shard, always the same, and logged.
    """

    Config = LossesConfig

    def check(self, objective: Objective) -> None:
        super().check(objective)
        if any("position" not in samples.batch([0])[0] for samples in self.context.held_out.values()):
            raise RunError(
                "evaluation losses needs held-out samples as in training; those of objective"
                f" {name_of(type(objective))} are full images, for evaluation segmentation"
            )

    def run(self, subject: Subject) -> Result:
        metrics: dict[str, float] = {}
        for stream, samples in self.context.held_out.items():
            found = self._of_stream(subject, samples)
            metrics |= {f"{stream}/{name}" if stream else name: value for name, value in found.items()}
        about = {"method": "losses", "encoder": self.encoder_name(subject), "data": "held-out samples"}
        return Result(metrics, [about | metrics] if metrics else [])

    @torch.no_grad()
    def _of_stream(self, subject: Subject, samples: Samples) -> dict[str, float]:
        module, groups = subject.module, self._groups(subject, samples)
        means, training = WeightedMeans(), module.training
        module.eval()
        ahead = Ahead(self._fetch(subject, samples, groups))
        for group in groups:
            counted = self._on_device(module, group, ahead)
            if isinstance(module, CoupledObjective):
                outcomes = held_out_losses(subject.forward, counted)
            else:
                outcomes = ((*subject.forward(batch), counts) for batch, counts in counted)
            for losses, metrics, counts in outcomes:
                means.add(losses, metrics, counts)
        module.train(training)
        return means.reduce(self.context.loss_weights)

    def _groups(self, subject: Subject, samples: Samples) -> list[list[HeldOutBatch]]:
        """Returns this rank's micro-batches of each group."""
        context, couples = self.context, isinstance(subject.module, CoupledObjective)
        shard = BatchShard(context.group, context.micro_batch, dist.get_rank(), dist.get_world_size())
        return plan(len(samples), context.max_samples, shard, whole_groups=couples)

    def _fetch(
        self, subject: Subject, samples: Samples, groups: Sequence[Sequence[HeldOutBatch]]
    ) -> Iterator[list[Batch]]:
        """Yields the micro-batches of the groups, one at a time, prepared."""
        replaced = []
        positions = [one.positions for group in groups for one in group]
        loaded = iter(load(samples, positions, self.context.workers))
        for group in groups:
            batches = []
            for batch, bad in itertools.islice(loaded, len(group)):
                self.context.progress(f"step {subject.step}, held out")
                replaced.extend(bad)
                batches.append(batch)
            yield from ([batch] for batch in prepare(subject.module, batches))
        if replaced:
            log.warning("%d held-out samples were replaced; the first: %s", len(replaced), replaced[0])

    def _on_device(self, module: Objective, group: list[HeldOutBatch], ahead: Ahead) -> Iterator[tuple[Batch, Counts]]:
        """Yields the micro-batches of a group on the device, and the counts of each: padding counts nothing."""
        for one in group:
            (batch,) = ahead.next_step()
            counts = module.counts(batch)
            yield ahead.take(batch), counts if one.real else dict.fromkeys(counts, 0)
            ahead.send([])
