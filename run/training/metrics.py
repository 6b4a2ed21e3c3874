"""Metrics of a run: flat JSON lines, TensorBoard and, where one is named, an experiment tracker."""

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from mug.run.cluster import hardware
from mug.run.common.errors import RunError
from mug.run.common.output import write_whole
from mug.run.common.packages import load_package
from mug.run.reporting.records import read_rows


def logged_losses(output: Path, last: int) -> list[float]:
    """Yields `loss/total`, where finite, of the steps up to `last` that a run has logged."""
    path = output / "metrics.jsonl"
    rows = [row for row in (read_rows(path) if path.exists() else []) if row["kind"] == "train"]
    return [row["loss/total"] for row in rows if row["step"] <= last and row["loss/total"] is not None]


def start_tracker(name: str, output: Path) -> Any:
    """Start or resume the run of this output folder in the experiment tracker `name`; only "wandb" is known.

    Raises:
        RunError: an unknown tracker, one that is not installed, or one that cannot start.
    """
    if name != "wandb":
        raise RunError(f"tracker {name} is not one of wandb")
    wandb, remembered = load_package("wandb", "wandb"), output / "wandb.id"
    if not remembered.exists():
        write_whole(remembered, secrets.token_hex(4))
    # No metadata: the command line may hold signed URLs.
    settings = wandb.Settings(console="off", disable_git=True, x_disable_meta=True)
    run_id = remembered.read_text(encoding="utf-8")
    try:
        run = wandb.init(project="mug", name=output.name, id=run_id, resume="allow", dir=output, settings=settings)
    except wandb.Error as error:
        raise RunError(
            f"tracker wandb: {' '.join(str(error).split())}; run `wandb login`, or set WANDB_MODE=offline"
        ) from error
    run.define_metric("*", step_metric="step")  # wandb's own steps cannot go back, and a resumed run's do
    return run


class MetricsWriter:
    """Appends rows to OUTPUT/metrics.jsonl, and scalars to OUTPUT/tensorboard and to an experiment tracker, if named.

    A run that resumes from step `resumed` first drops the rows of later steps, which it will write again:
    each step appears in the file once.
    """

    def __init__(self, output: Path, resumed: int, tracker: str | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.file = output / "metrics.jsonl", None
        self.truncate_after(resumed)
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=resumed + 1)
        self.tracker = start_tracker(tracker, output) if tracker else None

    def truncate_after(self, after: int) -> None:
        """Drop the rows of steps after `after`, except those that record when the run was started."""
        rows = read_rows(self.path) if self.path.exists() else []
        kept = [row for row in rows if row["step"] <= after or row.get("event") in ("start", "resume")]
        fresh = self.path.with_suffix(".fresh")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(fresh, self.path)
        if self.file:
            self.file.close()
        self.file = self.path.open("a", buffering=1, encoding="utf-8")

    def write(self, kind: str, step: int, metrics: dict[str, object]) -> None:
        """Write one row; `kind` is train, eval or event. Numbers also go to TensorBoard and tracker as kind/name."""
        broken = {
            name: None for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)
        }
        row = {**metrics, **broken}  # JSON has no NaN
        self.file.write(json.dumps({"kind": kind, "step": step, **row}) + "\n")
        scalars = {f"{kind}/{name}": value for name, value in metrics.items() if isinstance(value, int | float)}
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.log({"step": step, **scalars})

    def flush(self) -> None:
        """Flush to disk: rows of steps that a checkpoint holds are not written again, so they must precede it."""
        self.file.flush()
        self.board.flush()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        self.board.close()
        if self.tracker:
            self.tracker.finish(exit_code=1 if error else 0)


def open_metrics(
    output: Path, resumed: int, tracker: str | None = None
) -> contextlib.AbstractContextManager[MetricsWriter | None]:
    """The writer on rank 0, None on the others."""
    opened: list[MetricsWriter] = []
    hardware.on_rank_zero(lambda: opened.append(MetricsWriter(output, resumed, tracker)))
    return opened[0] if opened else contextlib.nullcontext()


class GoodputClock:
    """Goodput: the share of the time since a run's first start that advanced it, without steps that a crash undid."""

    def __init__(self, begun: float):
        self.begun, self.trained = begun, 0.0

    def goodput(self) -> float:
        return self.trained / max(time.time() - self.begun, 1e-9)

    def state_dict(self) -> dict[str, float]:
        """`begun`, in Unix seconds, and the seconds of training, without waits for data."""
        return {"begun": self.begun, "trained_seconds": self.trained}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.begun, self.trained = state["begun"], state["trained_seconds"]


class Throughput:
    """Speed since the last reading, without the time spent on evaluations and checkpoints.

    batch: samples of a step, over all ranks. clock: where the goodput is reported, too.
    """

    def __init__(self, batch: int, clock: GoodputClock | None = None):
        self.clock = clock
        self.batch = batch
        self.peak_flops = hardware.peak_flops()
        self._restart()

    def _restart(self) -> None:
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0
        self.flops = 0.0

    def count(self, flops: float = 0.0) -> None:
        """Count one step, and this rank's floating-point operations in it, forward and backward, where known."""
        self.flops += flops
        self.steps += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the wait for a step's data, inside the `with` block."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Exclude from the speed what is not training, inside the `with` block."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """Returns `images_per_s`, `data_wait` (share of the step), `memory_gb`; `goodput`, `tflops` (of a rank) and
        `mfu` where known."""
        seconds = time.perf_counter() - self.start
        rate = self.steps * self.batch / seconds
        metrics = {"images_per_s": rate, "data_wait": self.waited / seconds}
        if self.clock:
            self.clock.trained += seconds - self.waited
            metrics["goodput"] = self.clock.goodput()
        if self.flops:
            metrics["tflops"] = self.flops / seconds / 1e12
        if self.peak_flops and self.flops:
            metrics["mfu"] = self.flops / (seconds * self.peak_flops)
        self._restart()
        return {**metrics, "memory_gb": hardware.peak_memory_gb()}


class DataWaitWarning:
    """Warns of a loader that keeps training waiting: twice in a row, for one reading may fall on its start."""

    LIMIT = 0.05

    def __init__(self, workers: int):
        self.workers = workers
        self.late = 0

    def check(self, data_wait: float) -> str | None:
        """Returns a warning each time that the share `data_wait` of a step begins to stay above the limit."""
        self.late = self.late + 1 if data_wait > self.LIMIT else 0
        if self.late != 2:
            return None
        return (
            f"the data loader keeps training waiting {data_wait:.0%} of the time: raise data.workers"
            f" (now {self.workers}) or set data.decode to fast"
        )
