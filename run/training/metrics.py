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

from mug.run.training import hardware


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without one that a crash cut in mid-write."""
    rows = []
    # Lines end in \n alone: a caption in JSON may hold U+2028 or U+0085, which splitlines() takes for ends.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def logged_losses(output: Path, last: int) -> list[float]:
    """`loss/total`, where finite, of the steps up to `last` that a run has logged."""
    path = output / "metrics.jsonl"
    rows = [row for row in (read_rows(path) if path.exists() else []) if row["kind"] == "train"]
    return [row["loss/total"] for row in rows if row["step"] <= last and row["loss/total"] is not None]


class MetricsWriter:
    """Appends rows to OUTPUT/metrics.jsonl and scalars to OUTPUT/tensorboard.

    A run that goes on from step `resumed` first drops the rows of later steps, which it will write again:
    each step stands in the file once.
    """

    def __init__(self, output: Path, resumed: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.file = output / "metrics.jsonl", None
        self.forget(resumed)
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=resumed + 1)

    def forget(self, after: int) -> None:
        """Drop the rows of steps after `after`, except those that say when the run was started."""
        rows = read_rows(self.path) if self.path.exists() else []
        kept = [row for row in rows if row["step"] <= after or row.get("event") in ("start", "resume")]
        fresh = self.path.with_suffix(".fresh")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(fresh, self.path)
        if self.file:
            self.file.close()
        self.file = self.path.open("a", buffering=1)

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


def open_metrics(output: Path, resumed: int) -> contextlib.AbstractContextManager[MetricsWriter | None]:
    """The writer on rank 0, None on the others."""
    return MetricsWriter(output, resumed) if dist.get_rank() == 0 else contextlib.nullcontext()


class Clock:
    """How much of the time since a run was first started has advanced it: steps that a crash undid have not."""

    def __init__(self, begun: float):
        self.begun, self.trained = begun, 0.0

    def goodput(self) -> float:
        return self.trained / max(time.time() - self.begun, 1e-9)

    def state_dict(self) -> dict[str, float]:
        """`begun`, in Unix seconds, and the seconds of training, without waits for data."""
        return {"begun": self.begun, "trained_seconds": self.trained}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.begun, self.trained = state["begun"], state["trained_seconds"]


class Meter:
    """Speed since the last reading, without the time spent on evaluations and checkpoints.

    batch: samples of a step, over all ranks. clock: where the goodput is to be told, too.
    """

    def __init__(self, batch: int, clock: Clock | None = None):
        self.clock = clock
        self.batch = batch
        self.peak_flops = hardware.peak_flops()
        self._restart()

    def _restart(self) -> None:
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0
        self.flops = 0.0

    def count(self, flops: float) -> None:
        """The floating-point operations of this rank in a step, forward and backward."""
        self.flops += flops

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
        """`images_per_s`, `data_wait` (share of the step), `memory_gb`; `goodput`, `mfu` where they can be known."""
        seconds = time.perf_counter() - self.start
        rate = self.steps * self.batch / seconds
        figures = {"images_per_s": rate, "data_wait": self.waited / seconds}
        if self.clock:
            self.clock.trained += seconds - self.waited
            figures["goodput"] = self.clock.goodput()
        if self.peak_flops and self.flops:
            figures["mfu"] = self.flops / (seconds * self.peak_flops)
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
