"""The parts of a run, and its log: metrics, checkpoints and replaced samples."""

import contextlib
import dataclasses
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch.distributed as dist

from mug.data.bad_samples import BadSampleLog
from mug.data.stream import TrainStream
from mug.model.objectives.objective import Objective
from mug.run.cluster import hardware
from mug.run.cluster.rank_monitor import RankMonitor
from mug.run.common.console import Console
from mug.run.evaluators.evaluator import Evaluator
from mug.run.state.checkpoint import Checkpoint
from mug.run.state.saver import Saver
from mug.run.training.collapse import CollapseAlarm
from mug.run.training.metrics import DataWaitWarning, GoodputClock, MetricsWriter, Throughput, open_metrics
from mug.run.training.recipe import Command, Recipe, recorded
from mug.run.training.spikes import SpikeAlarm
from mug.run.training.startup_timer import StartupTimer


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop works with.

    description: what identifies the model, for the manifest. files: texts that each checkpoint holds, by
    name.
    """

    command: Command
    engine: Any
    description: dict[str, dict[str, Any]]
    files: dict[str, str]
    stream: TrainStream
    bad_samples: BadSampleLog
    spikes: SpikeAlarm
    evaluators: dict[str, Evaluator]
    steps: int
    console: Console
    phases: StartupTimer
    monitor: RankMonitor

    @property
    def recipe(self) -> Recipe:
        return self.command.recipe

    @property
    def objective(self) -> Objective:
        return self.engine.module


@dataclasses.dataclass(frozen=True)
class Log:
    """What logs and saves the training."""

    metrics: MetricsWriter | None  # on rank 0
    meter: Throughput
    alarm: DataWaitWarning
    collapse: CollapseAlarm
    saver: Saver

    def event(self, step: int, name: str, metrics: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.write("event", step, {"event": name, **metrics})


@contextlib.contextmanager
def open_log(run: Run, resumed: Checkpoint | None) -> Iterator[Log]:
    """Opens the log of a run that resumes from `resumed`, if given."""
    output, recipe = run.command.output, run.recipe
    clock = GoodputClock(run.phases.began)
    if resumed:
        clock.load_state_dict(resumed.manifest["clock"])
    with open_metrics(output, resumed.step if resumed else 0, recipe.trainer.tracker) as metrics:
        log = Log(
            metrics,
            Throughput(recipe.trainer.global_batch, clock),
            DataWaitWarning(recipe.workers),
            CollapseAlarm(),
            Saver(run.engine, output, recipe.checkpoint, lambda step, seconds: log.event(step, "checkpoint", seconds)),
        )
        run.phases.end("metrics")
        yield log


def flush_bad_samples(run: Run) -> None:
    """Log the samples that were replaced in the steps up to here."""
    replaced = hardware.gather(run.stream.take_replacements())
    hardware.on_rank_zero(lambda: run.bad_samples.add(replaced, run.stream.next_position))


def save(run: Run, log: Log, step: int) -> None:
    """Save weights, optimizer, the data's state, and the task's files."""
    run.monitor.progress(f"step {step}, its checkpoint")
    if log.metrics:
        log.metrics.flush()
    state = {
        "model": run.description,
        "recipe": recorded(run.recipe),
        "data": run.stream.state_dict() | {"bad_samples": run.bad_samples.state_dict()},
        "clock": log.meter.clock.state_dict(),
        "world_size": dist.get_world_size(),
        "zero_stage": run.engine.zero_optimization_stage(),
    }
    log.saver.save(step, state, run.files)


def precision(engine: Any) -> str:
    return "bf16" if engine.bfloat16_enabled() else "fp32"


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "deepspeed", "timm")}
