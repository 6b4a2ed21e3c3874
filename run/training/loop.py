"""The loop around DeepSpeed's engine: one for every objective."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist

from mug.data.kinds.samples import Batch
from mug.run.cluster import hardware
from mug.run.cluster.ahead import Ahead
from mug.run.cluster.coupled import prepare
from mug.run.cluster.losses import WeightedMeans
from mug.run.cluster.preemption import PreemptionSignal
from mug.run.common.errors import RestartRequested
from mug.run.evaluators.evaluator import Evaluator, Subject
from mug.run.evaluators.results import save_examples
from mug.run.reporting.records import correct_line
from mug.run.state.averages import update_teachers
from mug.run.state.checkpoint import Checkpoint
from mug.run.training.engine import set_learning_rate, whole_copy
from mug.run.training.recipe import TrainerConfig, count_steps
from mug.run.training.recovery import handle_nonfinite, rollback_on_spike
from mug.run.training.run import Log, Run, flush_bad_samples, open_log, precision, save, versions
from mug.run.training.schedule import SCHEDULES, Schedule, jump
from mug.run.training.step import train_step

# What decides the learning rate.
SCHEDULED = ("max_steps", "epochs", "base_learning_rate", "min_learning_rate", "schedule", "warmup_samples")

# Prefixes of the metrics that the terminal shows; a named stream's stand behind its name.
SHOWN = (
    "/loss/",
    "/acc",
    "/recall@1/",
    "/mean IoU/segments",
    "/captions/BLEU-4",
    "/translation/BLEU",
    "/text retrieval/mean",
)


def log_summary(run: Run, resumed: Checkpoint | None) -> None:
    """Log what is about to be trained, on what, from where to where."""
    trainer, share, info = run.recipe.trainer, run.stream.share, run.console.info
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.parameters())
    accumulation = share.global_batch // (share.micro_batch * share.world)
    info(f"{run.recipe.objective} {run.recipe.model.preset}, {parameters / 1e6:.1f}M parameters, {run.command.output}")
    info(f"{run.stream.samples:,} samples an epoch, {run.steps:,} steps of {share.global_batch}")
    info(
        f"batch {share.global_batch} = {share.micro_batch} x {accumulation} accumulation x {share.world} rank(s)"
        f" on {hardware.describe_device()}, {precision(run.engine)}, ZeRO stage {run.engine.zero_optimization_stage()}"
    )
    if trainer.warmup_samples > run.steps * share.global_batch:
        run.console.warn(
            f"trainer.warmup_samples {trainer.warmup_samples:,} is more than the run's"
            f" {run.steps * share.global_batch:,} samples: the learning rate never reaches its peak"
        )
    if resumed and resumed.step >= run.steps:
        info(f"step {resumed.step} was the last one; to train more, raise trainer.max_steps or choose another --output")
    elif resumed:
        info(f"resuming after step {resumed.step} from {resumed.folder}")
        warn_of_jump(run, resumed)


def schedule_of(trainer: TrainerConfig, steps: int) -> Schedule:
    total = steps * trainer.global_batch
    shape = SCHEDULES[trainer.schedule]
    return shape(trainer.learning_rate, trainer.min_learning_rate, trainer.warmup_samples, total)


def warn_of_jump(run: Run, resumed: Checkpoint) -> None:
    """Warn where the learning rate does not continue as the checkpoint's recipe would have it."""
    before, now = resumed.manifest["recipe"]["trainer"], run.recipe.trainer
    saved = dataclasses.replace(now, **{name: before[name] for name in SCHEDULED if name in before})
    steps = count_steps(saved, run.stream.samples)
    if line := jump(schedule_of(saved, steps), schedule_of(now, run.steps), resumed.step, now.global_batch):
        run.console.warn(f"{line} (the run had {steps:,} steps, and now has {run.steps:,})")


def train(run: Run, resumed: Checkpoint | None) -> None:
    """Train to the end, with metrics, evaluations and checkpoints on the way.

    Raises:
        RestartRequested: a rank was asked to end, and the state is saved; or a loss spike was rolled back.
        Diverged: the loss or the gradient of a step is not finite, and `faults.nonfinite` does not skip it.
    """
    trainer, done = run.recipe.trainer, resumed.step if resumed else 0
    if done >= run.steps:
        return
    schedule = schedule_of(trainer, run.steps)
    preemption = PreemptionSignal()
    run.console.start_bar(run.steps, done)
    with open_log(run, resumed) as log:
        ahead = Ahead(fetch_steps(run, log, done))
        for step in range(done + 1, run.steps + 1):
            preemption.start()
            micro_batches = ahead.next_step()
            log.meter.count(sum(map(run.objective.flops, micro_batches)))
            run.phases.end("first_batch")
            run.monitor.progress(f"step {step}")
            learning_rate = schedule((step - 0.5) * trainer.global_batch)
            set_learning_rate(run.engine, learning_rate, trainer.learning_rate)
            means = train_step(run.engine, micro_batches, run.recipe.active_losses, ahead, trainer.groups)
            run.phases.end("first_step")
            if step == done + 1:
                log.event(done, "resume" if done else "start", environment(run))
            if run.engine.was_step_applied():
                run.stream.advance()
                update_teachers(run.engine, step / run.steps)
                run.objective.after_step(step * trainer.global_batch)
            else:
                handle_nonfinite(run, log, step, micro_batches, means)
            run.monitor.reached = step
            after_step(run, log, step, learning_rate, means, preemption.result())
        log.saver.finish()


def fetch_steps(run: Run, log: Log, done: int) -> Iterator[list[Batch]]:
    """Yields the micro-batches of each step after `done`, prepared; measures the wait for them."""
    batches = iter(run.stream)
    for step in range(done + 1, run.steps + 1):
        place = run.monitor.place
        run.monitor.progress(f"step {step}, its data")
        with log.meter.waiting():
            micro_batches = next(batches)
        run.monitor.progress(place)
        yield prepare(run.engine.module, micro_batches, run.recipe.trainer.groups)


def environment(run: Run) -> dict[str, Any]:
    """Returns the context of a curve: position in the data, ranks, device, versions; and the seconds of the startup."""
    return {
        "position": run.stream.next_position,
        "world_size": dist.get_world_size(),
        "zero_stage": run.engine.zero_optimization_stage(),
        "device": hardware.describe_device(),
        "precision": precision(run.engine),
        **versions(),
        **run.phases.metrics(),
    }


# --- After a step -----------------------------------------------------------------------------------------


def after_step(run: Run, log: Log, step: int, learning_rate: float, means: WeightedMeans, signal: str | None) -> None:
    """Log, evaluate and save where they are due.

    Raises:
        RestartRequested: a rank has received `signal`, and the state is saved; or a loss spike was rolled back.
    """
    trainer, line = run.recipe.trainer, None
    last, logged = step == run.steps, step % trainer.log_every == 0
    to_save = (
        last or signal or step % run.recipe.checkpoint.every_steps == 0 or (logged and log.saver.interval_elapsed())
    )
    if logged or to_save:
        metrics = log_step(run, log, step, learning_rate, means)
        if run.spikes.check(metrics["loss/total"]):
            rollback_on_spike(run, log, step, metrics["loss/total"])
        line = f"{format_metrics(metrics)}  lr {learning_rate:.2e}  {metrics['images_per_s']:.0f} images/s"
    run.console.step(step, line)
    with log.meter.pausing():
        if due := due_evaluations(run, step, signal):
            evaluate(run, log, step, due)
        if to_save:
            save(run, log, step)
        elif logged:
            log.saver.poll()
    if signal and not last:
        log.saver.finish()
        raise RestartRequested(f"{signal}: step {step} is saved; rerun the same command to resume")


def log_step(run: Run, log: Log, step: int, learning_rate: float, means: WeightedMeans) -> dict[str, float]:
    """Write a step's row; returns its metrics."""
    flush_bad_samples(run)
    norm = run.engine.get_global_grad_norm()
    metrics = {
        **means.reduce(run.recipe.active_losses),
        "lr": learning_rate,
        **log.meter.read(),
        "bad_samples": run.bad_samples.entries,
        "grad_norm": None if norm is None else float(norm),
    }
    if log.metrics:
        log.metrics.write("train", step, {"position": run.stream.next_position, **metrics})
    for line in (log.alarm.check(metrics["data_wait"]), log.collapse.check(metrics)):
        if line:
            run.console.warn(line)
    return metrics


def due_evaluations(run: Run, step: int, signal: str | None) -> dict[str, Evaluator]:
    """Returns the recipe's evaluations that are due after this step: all after the last one, and none where a rank was
    asked to end."""
    if step == run.steps:
        return run.evaluators
    every = run.recipe.trainer.eval_every
    due = {name: one for name, one in run.evaluators.items() if step % (one.config.every or every) == 0}
    return {} if signal else due


def evaluate(run: Run, log: Log, step: int, evaluators: Mapping[str, Evaluator]) -> None:
    """Run these evaluations; log what they find."""
    metrics: dict[str, float] = {}
    subject = Subject(run.objective, run.engine, lambda: whole_copy(run.engine), step)
    for name, evaluator in evaluators.items():
        run.monitor.progress(f"step {step}, {name}")
        result = evaluator.run(subject)
        save_examples(result, run.command.output, step)
        metrics |= result.metrics
    if metrics:
        run.console.info(f"step {step}  held out: {format_metrics(metrics)}")
    if line := correct_line(metrics):
        run.console.info(f"step {step}  held out: {line}")
    if log.metrics:
        log.metrics.write("eval", step, {"position": run.stream.next_position, **metrics})


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Returns losses, accuracies and the like, for the terminal."""
    shown = {name: value for name, value in metrics.items() if any(part in f"/{name}" for part in SHOWN)}
    return "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
