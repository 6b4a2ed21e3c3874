"""Figures of a run: flat JSON lines and TensorBoard."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from mug.data.stream import Batch
from mug.model.flops import flops_per_sample
from mug.model.presets import Vocabulary
from mug.run.training import hardware
from mug.run.training.recipe import Recipe


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without one that a crash cut in mid-write."""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


class MetricsWriter:
    """Appends rows to OUTPUT/metrics.jsonl and scalars to OUTPUT/tensorboard.

    A run that goes on from step `resumed` first drops the rows of later steps, which it will write again:
    each step stands in the file once.
    """

    def __init__(self, output: Path, resumed: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = output / "metrics.jsonl"
        if self.path.exists():
            self._truncate(resumed)
        self.file = self.path.open("a", buffering=1)
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=resumed + 1)

    def _truncate(self, resumed: int) -> None:
        lives = ("start", "resume")
        rows = [row for row in read_rows(self.path) if row["step"] <= resumed or row.get("event") in lives]
        kept = [json.dumps(row) + "\n" for row in rows]
        fresh = self.path.with_suffix(".fresh")
        fresh.write_text("".join(kept))
        os.replace(fresh, self.path)

    def write(self, kind: str, step: int, figures: dict[str, object]) -> None:
        """One row; `kind` is train, eval or event. Numbers also go to TensorBoard as kind/name."""
        broken = {
            name: None for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)
        }
        row = {**figures, **broken}  # JSON has no NaN
        self.file.write(json.dumps({"kind": kind, "step": step, **row}) + "\n")
        for name, value in figures.items():
            if isinstance(value, int | float):
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Rows of steps that a checkpoint holds are not written again: they must be on disk before it."""
        self.file.flush()
        self.board.flush()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        self.board.close()


class Meter:
    """Speed since the last reading, without the time spent on evaluations and checkpoints."""

    def __init__(self, recipe: Recipe, vocabulary: Vocabulary):
        self.batch, self.model, self.vocabulary = recipe.trainer.global_batch, recipe.model, vocabulary
        peak = hardware.peak_flops()
        self.peak_flops = peak and peak * dist.get_world_size()
        self._restart()

    def _restart(self) -> None:
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0
        self.tokens = self.samples = 0

    def count(self, micro_batches: list[Batch]) -> None:
        """The text tokens of a step; padding is none, as the model computes nothing for it."""
        for batch in micro_batches:
            self.tokens += int((batch["tokens"] != self.vocabulary.pad).sum())
            self.samples += len(batch["tokens"])

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a step's data."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin
        self.steps += 1

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Around what is no training."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """`images_per_s`, `data_wait` (share of the step), `memory_gb`, and `mfu` where the peak is known."""
        seconds = time.perf_counter() - self.start
        rate = self.steps * self.batch / seconds
        figures = {"images_per_s": rate, "data_wait": self.waited / seconds}
        if self.peak_flops and self.samples:
            flops = flops_per_sample(self.model, self.vocabulary.size, self.tokens / self.samples)
            figures["mfu"] = rate * sum(flops.values()) / self.peak_flops
        self._restart()
        return {**figures, "memory_gb": hardware.peak_memory_gb()}


class WaitAlarm:
    """Notices a loader that keeps training waiting: twice in a row, for one reading may fall on its start."""

    LIMIT = 0.05

    def __init__(self, workers: int):
        self.workers = workers
        self.late = 0

    def check(self, data_wait: float) -> str | None:
        """What to say, once each time that the share `data_wait` of a step comes to stay above the limit."""
        self.late = self.late + 1 if data_wait > self.LIMIT else 0
        if self.late != 2:
            return None
        return (
            f"the data loader keeps training waiting {data_wait:.0%} of the time: raise data.workers"
            f" (now {self.workers}) or set data.decode to fast"
        )
