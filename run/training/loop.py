"""The loop around DeepSpeed's engine: the same for all that it trains; what is special about one is its task."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any, Protocol

import torch.distributed as dist

from mug.data.ledger import Ledger
from mug.data.stream import Batch, TrainStream
from mug.run.training import hardware
from mug.run.training.checkpoint import Checkpoint
from mug.run.training.console import Console
from mug.run.training.engine import set_learning_rate
from mug.run.training.errors import Restart
from mug.run.training.evaluation import HeldOut
from mug.run.training.interruption import Interruption
from mug.run.training.losses import Means, shares, total_loss
from mug.run.training.metrics import Clock, Meter, MetricsWriter, WaitAlarm, open_metrics
from mug.run.training.phases import Phases
from mug.run.training.recipe import Command
from mug.run.training.saver import Saver
from mug.run.training.schedule import CosineSchedule
from mug.run.training.watch import Watch


class Task(Protocol):
    """What is special about what is trained. All ranks call the same methods at the same steps."""

    loss_weights: Mapping[str, float]  # factor of each term in the total loss
    description: dict[str, dict[str, Any]]  # what tells the model from another one, for the manifest
    files: dict[str, str]  # texts that each checkpoint holds, by name

    def step_flops(self, micro_batches: list[Batch]) -> float:
        """FLOP of this rank's step, forward and backward."""

    def evaluate(self, run: "Run", step: int, figures: dict[str, float]) -> dict[str, float]:
        """Say what the held-out figures are; returns them with further ones."""

    def check_loss(self, run: "Run", log: "Log", step: int, loss: float) -> None:
        """Raise Restart or Diverged if training had better not go on after a step with this loss."""

    def not_finite(self, run: "Run", log: "Log", step: int, micro_batches: list[Batch], means: Means) -> None:
        """Raise Diverged, or pass over a step whose loss or gradient is not finite; no rank has updated anything."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop works with."""

    command: Command
    engine: Any
    task: Task
    stream: TrainStream
    ledger: Ledger | None  # where samples of the stream may be replaced
    held_out: HeldOut | None
    steps: int
    console: Console
    phases: Phases
    watch: Watch

    @property
    def recipe(self) -> Any:
        return self.command.recipe


@dataclasses.dataclass(frozen=True)
class Log:
    """What is told of the training, and what is saved of it."""

    metrics: MetricsWriter | None  # on rank 0
    meter: Meter
    alarm: WaitAlarm
    saver: Saver

    def event(self, step: int, name: str, figures: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.write("event", step, {"event": name, **figures})


def introduce(run: Run, resumed: Checkpoint | None, title: str, samples: str) -> None:
    """Say what is about to be trained, on what, from where to where; `samples` is their name."""
    trainer, share, say = run.recipe.trainer, run.stream.share, run.console.say
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.parameters())
    accumulation = share.global_batch // (share.micro_batch * share.world)
    say(f"{title}, {parameters / 1e6:.1f}M parameters, {run.command.output}")
    say(f"{run.stream.samples:,} {samples} an epoch, {run.steps:,} steps of {share.global_batch}")
    say(
        f"batch {share.global_batch} = {share.micro_batch} x {accumulation} accumulation x {share.world} rank(s)"
        f" on {hardware.describe_device()}, ZeRO stage {run.engine.zero_optimization_stage()}"
    )
    if trainer.warmup_samples > run.steps * share.global_batch:
        run.console.warn(
            f"trainer.warmup_samples {trainer.warmup_samples:,} is more than the run's"
            f" {run.steps * share.global_batch:,} samples: the learning rate never reaches its peak"
        )
    if resumed and resumed.step >= run.steps:
        say(f"step {resumed.step} was the last one; raise trainer.max_steps or name another --output to train more")
    elif resumed:
        say(f"going on after step {resumed.step} from {resumed.folder}")


def train(run: Run, resumed: Checkpoint | None) -> None:
    """Train to the end, if that is not reached, with metrics, evaluations and checkpoints on the way.

    Raises:
        Restart: a rank was asked to end, and the state is saved; or the task wants to begin again from a checkpoint.
        Diverged: the loss or the gradient of a step is not finite.
    """
    trainer, done = run.recipe.trainer, resumed.step if resumed else 0
    if done >= run.steps:
        return
    schedule = CosineSchedule(
        trainer.learning_rate, trainer.min_learning_rate, trainer.warmup_samples, run.steps * trainer.global_batch
    )
    interruption = Interruption()
    run.console.start_bar(run.steps, done)
    with open_log(run, resumed) as log:
        batches = iter(run.stream)
        for step in range(done + 1, run.steps + 1):
            interruption.ask()
            run.watch.at(f"step {step}, its data")
            with log.meter.waiting():
                micro_batches = next(batches)
            log.meter.count(run.task.step_flops(micro_batches))
            run.phases.end("first_batch")
            run.watch.at(f"step {step}")
            learning_rate = schedule((step - 0.5) * trainer.global_batch)
            set_learning_rate(run.engine, learning_rate)
            means = train_step(run.engine, micro_batches, run.task.loss_weights)
            run.phases.end("first_step")
            if step == done + 1:
                log.event(done, "resume" if done else "start", circumstances(run))
            if run.engine.was_step_applied():
                run.stream.advance()
            else:
                run.task.not_finite(run, log, step, micro_batches, means)
            finish_step(run, log, step, learning_rate, means, interruption.answer())
        log.saver.finish()


@contextlib.contextmanager
def open_log(run: Run, resumed: Checkpoint | None) -> Iterator[Log]:
    """What a run that goes on from `resumed` logs with."""
    output, recipe = run.command.output, run.recipe
    clock = Clock(run.phases.began)
    if resumed:
        clock.load_state_dict(resumed.manifest["clock"])
    with open_metrics(output, resumed.step if resumed else 0) as metrics:
        log = Log(
            metrics,
            Meter(recipe.trainer.global_batch, clock),
            WaitAlarm(recipe.data.workers),
            Saver(run.engine, output, recipe.checkpoint, lambda step, seconds: log.event(step, "checkpoint", seconds)),
        )
        run.phases.end("metrics")
        yield log


def train_step(engine: Any, micro_batches: list[Batch], weights: Mapping[str, float]) -> Means:
    """One optimizer step over this rank's micro-batches; returns the figures it was made of."""
    objective, means = engine.module, Means()
    counts = [objective.counts(batch) for batch in micro_batches]
    for batch, count, share in zip(micro_batches, counts, shares(counts, objective.terms), strict=True):
        losses, report = engine(hardware.to_device(batch))
        engine.backward(total_loss(losses, weights, dict(zip(objective.terms, share, strict=True))))
        engine.step()
        means.add(losses, report, count)
    return means


def circumstances(run: Run) -> dict[str, Any]:
    """What a curve should be read beside: the place in the data, ranks, device, versions; and how long it took here."""
    return {
        "position": run.stream.next_position,
        "world_size": dist.get_world_size(),
        "zero_stage": run.engine.zero_optimization_stage(),
        "device": hardware.describe_device(),
        **versions(),
        **run.phases.figures(),
    }


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "deepspeed", "timm")}


# --- After a step -----------------------------------------------------------------------------------------


def finish_step(run: Run, log: Log, step: int, learning_rate: float, means: Means, signal: str | None) -> None:
    """Log, evaluate and save where it is time for it.

    Raises:
        Restart: a rank has received `signal`, and the state is saved; or as the task's `check_loss`.
    """
    trainer, line = run.recipe.trainer, None
    last, logged = step == run.steps, step % trainer.log_every == 0
    to_save = last or signal or step % run.recipe.checkpoint.every_steps == 0 or (logged and log.saver.time_is_up())
    if logged or to_save:
        figures = log_step(run, log, step, learning_rate, means)
        run.task.check_loss(run, log, step, figures["loss/total"])
        line = f"{one_line(figures)}  lr {learning_rate:.2e}  {figures['images_per_s']:.0f} images/s"
    run.console.step(step, line)
    with log.meter.pausing():
        if run.held_out and (last or (step % trainer.eval_every == 0 and not signal)):
            evaluate(run, log, step)
        if to_save:
            save(run, log, step)
        elif logged:
            log.saver.poll()
    if signal and not last:
        log.saver.finish()
        raise Restart(f"{signal}: step {step} is saved; the same command goes on from there")


def log_step(run: Run, log: Log, step: int, learning_rate: float, means: Means) -> dict[str, float]:
    """Write a step's row; returns its figures."""
    note_replaced(run)
    norm = run.engine.get_global_grad_norm()
    figures = {
        **means.reduce(run.task.loss_weights),
        "lr": learning_rate,
        **log.meter.read(),
        **({"replaced": run.ledger.entries} if run.ledger else {}),
        "grad_norm": None if norm is None else float(norm),
    }
    if log.metrics:
        log.metrics.write("train", step, {"position": run.stream.next_position, **figures})
    if late := log.alarm.check(figures["data_wait"]):
        run.console.warn(late)
    return figures


def note_replaced(run: Run) -> None:
    """Put into the ledger what was replaced in the steps up to here."""
    if run.ledger:
        replaced = hardware.gather(run.stream.take_replaced())
        hardware.on_rank_zero(lambda: run.ledger.add(replaced, run.stream.next_position))


def evaluate(run: Run, log: Log, step: int) -> None:
    """Held-out losses, and what else the task wants to know then."""
    weights = run.task.loss_weights
    figures = run.held_out.evaluate(run.engine, weights, lambda: run.watch.at(f"step {step}, held out"))
    figures = run.task.evaluate(run, step, figures)
    if log.metrics:
        log.metrics.write("eval", step, {"position": run.stream.next_position, **figures})


def one_line(figures: Mapping[str, float]) -> str:
    """Losses and accuracies, for the terminal."""
    return "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if name.startswith(("loss/", "acc")))


def save(run: Run, log: Log, step: int) -> None:
    """Save weights, optimizer, the data's state, and the task's files."""
    run.watch.at(f"step {step}, its checkpoint")
    if log.metrics:
        log.metrics.flush()
    state = {
        "model": run.task.description,
        "recipe": dataclasses.asdict(run.recipe),
        "data": run.stream.state_dict() | ({"ledger": run.ledger.state_dict()} if run.ledger else {}),
        "clock": log.meter.clock.state_dict(),
        "world_size": dist.get_world_size(),
        "zero_stage": run.engine.zero_optimization_stage(),
    }
    log.saver.save(step, state, run.task.files)
