"""Held-out losses, and a picture of what the model makes of held-out pairs."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mug.data.loader import load
from mug.data.pairs import Pairs
from mug.run.training.hardware import to_device
from mug.run.training.losses import Means
from mug.run.training.pictures import draw_grid
from mug.run.training.recipe import TrainerConfig
from mug.run.training.samples import rows

PICTURED = 8  # held-out pairs in the picture

log = logging.getLogger("mug")


class HeldOut:
    """The first `eval_samples` held-out pairs, in micro-batches that the ranks take in turn.

    ZeRO-3 wants the same number of forward passes on all ranks: a rank whose turn has no batch left repeats the
    last one and counts it as nothing. So the figures are the same for any number of ranks.
    """

    def __init__(self, pairs: Pairs, trainer: TrainerConfig, workers: int):
        self.pairs = pairs
        self.workers = workers
        rank, world = dist.get_rank(), dist.get_world_size()
        count, micro_batch = min(trainer.eval_samples, len(pairs)), trainer.micro_batch
        batches = [range(i, min(i + micro_batch, count)) for i in range(0, count, micro_batch)]
        turns = range(rank, math.ceil(len(batches) / world) * world, world)
        self.real = [turn < len(batches) for turn in turns]
        self.batches = [batches[min(turn, len(batches) - 1)] for turn in turns]

    @torch.no_grad()
    def evaluate(self, engine: Any, weights: Mapping[str, float], began: Callable[[], None]) -> dict[str, float]:
        """Means over the held-out pairs, the same on all ranks: `loss/total`, `loss/TERM`, `accuracy/TERM`.

        `began` is called at each batch. A pair that cannot be used is replaced by another one of its shard, always
        the same, and said.
        """
        means, replaced = Means(), []
        engine.eval()
        for (batch, bad), real in zip(load(self.pairs, self.batches, self.workers), self.real, strict=True):
            began()
            replaced += bad
            losses, report = engine(to_device(batch))
            counts = engine.module.counts(batch)
            means.add(losses, report, counts if real else dict.fromkeys(counts, 0))
        engine.train()
        if replaced:
            log.warning("%d held-out pairs were replaced; the first: %s", len(replaced), replaced[0])
        return means.reduce(weights)

    def draw(self, model: nn.Module, path: Path) -> None:
        """A picture of some pairs, spread over the set. `model` holds whole weights: rank 0 does this alone."""
        count = min(PICTURED, len(self.pairs))
        batch, _ = self.pairs.batch([i * len(self.pairs) // count for i in range(count)])
        true = [self.pairs.tokenizer.decode(row[1:]) for row in batch["tokens"].tolist()]
        draw_grid(rows(model, self.pairs.tokenizer, batch["image"], batch["position"], true), path)
