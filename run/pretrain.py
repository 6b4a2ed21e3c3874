#!/usr/bin/env python3
"""Pre-train MUG on image-text pairs with DeepSpeed.

    deepspeed run/pretrain.py --deepspeed ds_configs/zero3.json

trains on the embedded default. A recipe can be named, and any of its keys changed:

    deepspeed run/pretrain.py --deepspeed ds_configs/zero3.json --config run/recipes/cc3m_base.yaml \
        --data.shards 'cc3m/{00000..00331}.tar' --trainer.max_steps 100 --output runs/try

The same command again goes on where the run stopped. `torchrun` and plain `python` start it too.
"""

import contextlib
import dataclasses
import fcntl
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mug.data.ledger import Ledger
from mug.data.stream import Batch, Share, TrainStream, open_held_out, open_train
from mug.model.flops import flops_per_sample
from mug.model.mug import OBJECTIVES
from mug.model.presets import Vocabulary
from mug.run.evaluation.neighbours import Neighbours
from mug.run.training import checkpoint, hardware
from mug.run.training.apex import check_apex
from mug.run.training.bundle import Bundle, MicroBatch
from mug.run.training.bundle import write as write_bundle
from mug.run.training.console import Console, run_command
from mug.run.training.deepspeed_config import check_batch, load_deepspeed_config
from mug.run.training.engine import (
    build_engine,
    recipe_values,
    set_learning_rate,
    whole_weights,
)
from mug.run.training.errors import Diverged, Restart, RunError
from mug.run.training.evaluation import HeldOut
from mug.run.training.interruption import Interruption
from mug.run.training.losses import Means, shares, total_loss
from mug.run.training.metrics import Clock, Meter, MetricsWriter, WaitAlarm, logged_losses, open_metrics
from mug.run.training.phases import Phases
from mug.run.training.recipe import Command, Recipe, changes, parse_command
from mug.run.training.restore import describe_model, load_engine
from mug.run.training.saver import Saver
from mug.run.training.schedule import CosineSchedule
from mug.run.training.sharded_state import SavedState, load_weights
from mug.run.training.spikes import SpikeAlarm, rewind
from mug.run.training.watch import Watch


def main(console: Console) -> None:
    # --- Parse: all that can be refused is refused here, before anything is written ---
    phases = Phases()
    phases.end("imports")
    command = parse_command()
    recipe = command.recipe
    rank, world = hardware.rank_and_world()
    hardware.use_cores()
    check_batch(recipe.trainer.global_batch, recipe.trainer.micro_batch, world)
    phases.end("parse")
    import deepspeed  # noqa: F401  it takes seconds, which a mistake above need not wait for

    phases.end("import_deepspeed")
    ds_config = load_deepspeed_config(command.deepspeed, recipe_values(recipe.trainer, recipe.model.width, world))
    check_apex(recipe.trainer, ds_config)
    check_writable(command.output)

    # --- Data ---
    share = Share(recipe.trainer.global_batch, recipe.trainer.micro_batch, rank, world)
    sizes = recipe.model.image_size, recipe.model.text_length
    stream = open_train(recipe.data, recipe.seed, *sizes, share)
    held_out = open_held_out(recipe.data, *sizes)
    neighbours = Neighbours(recipe.trainer.knn, recipe.data.cache, sizes[0]) if recipe.trainer.knn else None
    steps = count_steps(recipe, stream.samples)
    phases.end("data")

    # --- Ranks: from here on they watch over each other ---
    hardware.init_distributed(timeout=timedelta(minutes=recipe.safety.hang_minutes + 5))
    phases.end("process_group")
    with Watch(console, 60 * recipe.safety.hang_minutes) as watch:
        # --- Model, and the newest whole checkpoint, if this output has one of this model ---
        model = build_objective(recipe, vocabulary_of(stream))
        phases.end("model")
        hardware.on_rank_zero(lambda: lock(command.output))
        resumed = hardware.on_rank_zero(lambda: find_checkpoint(command, model, console))
        console.log_to(command.output / "logs" / f"rank{rank}.log")
        phases.end("find_checkpoint")

        # --- Engine ---
        engine = start_engine(model, ds_config, recipe, resumed, phases)
        if resumed:
            stream.load_state_dict(resumed.manifest["data"])
        ledger = open_ledger(command, stream, resumed)

        # --- Loop ---
        if held_out is not None:
            held_out = HeldOut(held_out, recipe.trainer.eval_samples, recipe.trainer.micro_batch, recipe.data.workers)
        run = Run(command, engine, stream, ledger, held_out, neighbours, steps, console, phases, watch)
        introduce(run, resumed)
        if not resumed or resumed.step < steps:
            train(run, resumed)
        dist.barrier()
    dist.destroy_process_group()


# --- Parse ------------------------------------------------------------------------------------------------


def check_writable(output: Path) -> None:
    """Raise RunError unless the run's folder can be made and written; what does not exist yet stays so."""
    existing = output
    with contextlib.suppress(PermissionError):
        while not existing.exists():
            existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise RunError(f"--output {output}: {existing} is no folder that can be written; name another")


def count_steps(recipe: Recipe, samples: int) -> int:
    """Optimizer steps of the run: trainer.max_steps, or what trainer.epochs passes over the data make."""
    trainer = recipe.trainer
    steps = (
        trainer.max_steps if trainer.max_steps is not None else int(trainer.epochs * samples // trainer.global_batch)
    )
    if steps < 1:
        raise RunError(
            f"trainer.epochs {trainer.epochs} x {samples} samples is less than one global batch of"
            f" {trainer.global_batch}; raise trainer.epochs or name trainer.max_steps"
        )
    return steps


# --- Model ------------------------------------------------------------------------------------------------


def vocabulary_of(stream: TrainStream) -> Vocabulary:
    t = stream.tokenizer
    return Vocabulary(size=t.vocab_size, pad=t.pad, bos=t.bos, eos=t.eos, mask=t.mask)


def build_objective(recipe: Recipe, vocabulary: Vocabulary) -> torch.nn.Module:
    """The objective with freshly drawn weights, the same on all ranks and for all ZeRO stages."""
    if recipe.objective not in OBJECTIVES:
        raise RunError(f"objective {recipe.objective!r} is not one of {', '.join(OBJECTIVES)}")
    torch.manual_seed(recipe.seed)
    model = OBJECTIVES[recipe.objective](recipe.model, vocabulary, recipe.seed)
    if set(recipe.loss_weights) != set(model.terms):
        raise RunError(
            f"loss_weights names {', '.join(recipe.loss_weights)}; {recipe.objective} has {', '.join(model.terms)}"
        )
    return model


# --- Resume -----------------------------------------------------------------------------------------------


def find_checkpoint(command: Command, model: torch.nn.Module, console: Console) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, of any number of ranks and any ZeRO stage.

    Raises:
        RunError: it is of another model, or of a run whose samples or shards would not fit this one's.
    """
    found = checkpoint.resume(command.output, console.warn)
    if found is not None:
        mine = describe_model(command.recipe.objective, model)
        for section, values in found.manifest["model"].items():
            for name, theirs in values.items():
                if name != "preset" and mine[section].get(name) != theirs:
                    raise RunError(
                        f"{found.folder} is a checkpoint of another model: {section} {name} is {theirs} there,"
                        f" {mine[section].get(name)} here; change the recipe back, or name another --output"
                    )
        theirs, ours = found.manifest["recipe"]["trainer"]["global_batch"], command.recipe.trainer.global_batch
        if theirs != ours:
            raise RunError(
                f"{found.folder} was written with global batch {theirs}, this run has {ours}; start it as it was, or"
                " name another --output"
            )
        check_changes(command, found, console)
    return found


def check_changes(command: Command, found: checkpoint.Checkpoint, console: Console) -> None:
    """Raise RunError where the recipe's keys that decide what is learned have changed, unless that is allowed."""
    if not (changed := changes(found.manifest["recipe"], command.recipe)):
        return
    line = f"{found.folder} was trained with {', '.join(changed)}"
    if not command.allow_changes:
        raise RunError(f"{line}; change back, name another --output, or go on with --allow_changes true")
    console.warn(line)


def start_engine(
    model: torch.nn.Module,
    ds_config: dict[str, Any],
    recipe: Recipe,
    resumed: checkpoint.Checkpoint | None,
    phases: Phases,
) -> Any:
    """DeepSpeed's engine around the model, in the state of the checkpoint if there is one."""
    if resumed:
        load_weights(model, SavedState(resumed.folder))
    phases.end("load_weights")
    engine = build_engine(model, ds_config, recipe.trainer)
    phases.end("engine")
    if resumed:
        load_engine(engine, resumed)
    phases.end("load_optimizer")
    return engine


def open_ledger(command: Command, stream: TrainStream, resumed: checkpoint.Checkpoint | None) -> Ledger:
    """The run's list of samples that could not be used; rank 0 keeps it."""
    data = command.recipe.data
    ledger = Ledger(command.output / "ledger.jsonl", stream.samples, data.max_bad_samples, data.max_bad_in_shard)
    state = resumed.manifest["data"]["ledger"] if resumed else ledger.state_dict()
    hardware.on_rank_zero(lambda: ledger.load_state_dict(state))
    return ledger


def lock(output: Path) -> None:
    """Keep the run's folder to this run until its process ends.

    Raises:
        RunError: another run holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(descriptor, 1000).decode()
        raise RunError(
            f"--output {output}: another run is writing there ({holder}); end it, or name another folder"
        ) from None
    os.truncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode())


# --- Loop -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop works with."""

    command: Command
    engine: Any
    stream: TrainStream
    ledger: Ledger
    held_out: HeldOut | None
    neighbours: Neighbours | None
    steps: int
    console: Console
    phases: Phases
    watch: Watch

    @property
    def recipe(self) -> Recipe:
        return self.command.recipe


def introduce(run: Run, resumed: checkpoint.Checkpoint | None) -> None:
    """Say what is about to be trained, on what, from where to where."""
    recipe, say = run.recipe, run.console.say
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.parameters())
    share = run.stream.share
    accumulation = share.global_batch // (share.micro_batch * share.world)
    say(f"{recipe.objective} {recipe.model.preset}, {parameters / 1e6:.1f}M parameters, {run.command.output}")
    say(f"{run.stream.samples:,} pairs an epoch, {run.steps:,} steps of {share.global_batch}")
    say(
        f"batch {share.global_batch} = {share.micro_batch} x {accumulation} accumulation x {share.world} rank(s)"
        f" on {hardware.describe_device()}, ZeRO stage {run.engine.zero_optimization_stage()}"
    )
    if recipe.trainer.warmup_samples > run.steps * share.global_batch:
        run.console.warn(
            f"trainer.warmup_samples {recipe.trainer.warmup_samples:,} is more than the run's"
            f" {run.steps * share.global_batch:,} samples: the learning rate never reaches its peak"
        )
    if resumed and resumed.step >= run.steps:
        say(f"step {resumed.step} was the last one; raise trainer.max_steps or name another --output to train more")
    elif resumed:
        say(f"going on after step {resumed.step} from {resumed.folder}")


def train(run: Run, resumed: checkpoint.Checkpoint | None) -> None:
    """Train to the end, with metrics, evaluations and checkpoints on the way.

    Raises:
        Restart: a rank was asked to end, and the state is saved; or a loss spike was undone.
        Diverged: the loss or the gradient of a step is not finite.
    """
    trainer, done = run.recipe.trainer, resumed.step if resumed else 0
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
            log.meter.count(step_flops(run, micro_batches))
            run.phases.end("first_batch")
            run.watch.at(f"step {step}")
            learning_rate = schedule((step - 0.5) * trainer.global_batch)
            set_learning_rate(run.engine, learning_rate)
            means = train_step(run.engine, micro_batches, run.recipe.loss_weights)
            run.phases.end("first_step")
            if step == done + 1:
                log.event(done, "resume" if done else "start", circumstances(run))
            if not run.engine.was_step_applied():
                skip_or_stop(run, log, step, micro_batches, means)
            else:
                run.stream.advance()
            finish_step(run, log, step, learning_rate, means, interruption.answer())
        log.saver.finish()


def finish_step(run: Run, log: "Log", step: int, learning_rate: float, means: Means, signal: str | None) -> None:
    """Log, evaluate and save where it is time for it.

    Raises:
        Restart: a rank has received `signal`, and the state is saved; or a loss spike was undone.
    """
    trainer, line = run.recipe.trainer, None
    last, logged = step == run.steps, step % trainer.log_every == 0
    to_save = last or signal or step % run.recipe.checkpoint.every_steps == 0 or (logged and log.saver.time_is_up())
    if logged or to_save:
        figures = log_step(run, log, step, learning_rate, means)
        if log.spikes.check(figures["loss/total"]):
            go_back(run, log, step, figures["loss/total"])
        line = f"{_line(figures)}  lr {learning_rate:.2e}  {figures['images_per_s']:.0f} images/s"
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


def train_step(engine: Any, micro_batches: list[Batch], weights: dict[str, float]) -> Means:
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


@dataclasses.dataclass(frozen=True)
class Log:
    """What is told of the training, and what is saved of it."""

    metrics: MetricsWriter | None  # on rank 0
    meter: Meter
    alarm: WaitAlarm
    spikes: SpikeAlarm
    saver: Saver

    def event(self, step: int, name: str, figures: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.write("event", step, {"event": name, **figures})


@contextlib.contextmanager
def open_log(run: Run, resumed: checkpoint.Checkpoint | None) -> Iterator[Log]:
    """What a run that goes on from `resumed` logs with."""
    output, recipe = run.command.output, run.recipe
    clock = Clock(run.phases.began)
    if resumed:
        clock.load_state_dict(resumed.manifest["clock"])
    with open_metrics(output, resumed.step if resumed else 0) as metrics:
        losses = hardware.on_rank_zero(lambda: logged_losses(output))
        log = Log(
            metrics,
            Meter(recipe.trainer.global_batch, clock),
            WaitAlarm(recipe.data.workers),
            SpikeAlarm(recipe.safety.spike_factor, losses),
            Saver(run.engine, output, recipe.checkpoint, lambda step, seconds: log.event(step, "checkpoint", seconds)),
        )
        run.phases.end("metrics")
        yield log


def step_flops(run: Run, micro_batches: list[Batch]) -> float:
    """FLOP of this rank's step; captions' padding is none, as the model computes nothing for it."""
    vocabulary, flops = run.engine.module.vocabulary, 0.0
    for batch in micro_batches:
        samples = len(batch["tokens"])
        text_tokens = int((batch["tokens"] != vocabulary.pad).sum()) / samples
        flops += samples * sum(flops_per_sample(run.recipe.model, vocabulary.size, text_tokens).values())
    return flops


def log_step(run: Run, log: Log, step: int, learning_rate: float, means: Means) -> dict[str, float]:
    """Write a step's row; returns its figures."""
    note_replaced(run)
    norm = run.engine.get_global_grad_norm()
    figures = {
        **means.reduce(run.recipe.loss_weights),
        "lr": learning_rate,
        **log.meter.read(),
        "replaced": run.ledger.entries,
        "grad_norm": None if norm is None else float(norm),
    }
    if log.metrics:
        log.metrics.write("train", step, {"position": run.stream.next_position, **figures})
    if late := log.alarm.check(figures["data_wait"]):
        run.console.warn(late)
    return figures


def note_replaced(run: Run) -> None:
    """Put into the ledger what was replaced in the steps up to here."""
    replaced = hardware.gather(run.stream.take_replaced())
    hardware.on_rank_zero(lambda: run.ledger.add(replaced, run.stream.next_position))


def evaluate(run: Run, log: Log, step: int) -> None:
    """Held-out losses; a picture, and nearest neighbours, of a whole copy of the weights on rank 0."""
    figures = run.held_out.evaluate(run.engine, run.recipe.loss_weights, lambda: run.watch.at(f"step {step}, held out"))
    run.console.say(f"step {step}  held out: {_line(figures)}")
    weights = whole_weights(run.engine)
    if log.metrics:
        objective = run.engine.module
        copy = type(objective)(objective.config, objective.vocabulary, objective.seed)
        copy.load_state_dict(weights)
        run.held_out.draw(copy, run.command.output / "samples" / f"step-{step}.png")
        if run.neighbours:
            run.watch.at(f"step {step}, nearest neighbours")
            figures["accuracy/knn"] = run.neighbours.accuracy(copy.encoder)
            run.console.say(f"step {step}  nearest neighbours: {100 * figures['accuracy/knn']:.2f}% top-1")
        log.metrics.write("eval", step, {"position": run.stream.next_position, **figures})
    dist.barrier()


def _line(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if name.startswith(("loss/", "acc")))


def save(run: Run, log: Log, step: int) -> None:
    """Save weights, optimizer, the data's state, and what generate.py needs."""
    run.watch.at(f"step {step}, its checkpoint")
    if log.metrics:
        log.metrics.flush()
    state = {
        "model": describe_model(run.recipe.objective, run.engine.module),
        "recipe": dataclasses.asdict(run.recipe),
        "data": run.stream.state_dict() | {"ledger": run.ledger.state_dict()},
        "clock": log.meter.clock.state_dict(),
        "world_size": dist.get_world_size(),
        "zero_stage": run.engine.zero_optimization_stage(),
    }
    log.saver.save(step, state, {"tokenizer.json": run.stream.tokenizer.to_json()})


# --- When training goes wrong -----------------------------------------------------------------------------


def skip_or_stop(run: Run, log: Log, step: int, micro_batches: list[Batch], means: Means) -> None:
    """Deal with a step whose loss or gradient is not finite. No rank has updated anything.

    Raises:
        Diverged: safety.nonfinite is stop, or this happened too often.
    """
    checkpoint_before = f"checkpoint-{step - 1}" if step > 1 else None
    log.saver.finish()
    if step > 1 and not hardware.on_rank_zero((run.command.output / checkpoint_before).is_dir):
        note_replaced(run)
        save(run, log, step - 1)
        log.saver.finish()
    ran = [
        MicroBatch(dist.get_rank(), _range_of(batch["position"]), {term: loss.item() for term, loss in losses.items()})
        for batch, losses in zip(micro_batches, means.micro_batches, strict=True)
    ]
    bundle = Bundle(
        step=step,
        checkpoint=checkpoint_before,
        deepspeed=str(run.command.deepspeed),
        world_size=dist.get_world_size(),
        zero_stage=run.engine.zero_optimization_stage(),
        recipe=dataclasses.asdict(run.recipe),
        micro_batches=hardware.gather(ran),
        versions=versions(),
    )
    path = hardware.on_rank_zero(lambda: write_bundle(run.command.output, bundle))
    line = f"loss or gradient of step {step} is not finite; nothing was updated; see it again: run/replay.py {path}"
    if run.recipe.safety.nonfinite == "stop" or len(run.stream.skipped) >= run.recipe.safety.max_skips:
        raise Diverged(line)
    run.stream.skip()
    run.console.warn(f"{line}; its batch is skipped")
    log.event(step, "skip", {"positions": run.stream.skipped[-1], "bundle": str(path)})


def _range_of(position_B: torch.Tensor) -> tuple[int, int, int]:
    """Positions of a micro-batch, int64 [B], as the arguments of a range."""
    first, *others = position_B.tolist()
    stride = others[0] - first if others else 1
    return first, first + len(position_B) * stride, stride


def go_back(run: Run, log: Log, step: int, loss: float) -> None:
    """Undo a loss spike, and skip the batches that led to it.

    Raises:
        Restart: a checkpoint of this step was made of an earlier one.
        Diverged: there is none, or this happened too often.
    """
    log.saver.finish()
    safety = run.recipe.safety
    said = f"the loss of step {step}, {loss:.4g}, is a spike (safety.spike_factor {safety.spike_factor:g})"
    if len(run.stream.skipped) >= safety.max_skips:
        raise Diverged(f"{said}, and safety.max_skips {safety.max_skips} is reached")
    to = hardware.on_rank_zero(
        lambda: rewind(
            run.command.output, safety.spike_checkpoints, step, run.stream.next_position, run.recipe.checkpoint.keep
        )
    )
    if to is None:
        raise Diverged(f"{said}, and there is no checkpoint yet to go back to")
    skipped = [to.manifest["data"]["next_position"], run.stream.next_position]
    if log.metrics:
        log.metrics.forget(to.step)
    log.event(step, "rollback", {"to": to.step, "positions": skipped})
    raise Restart(
        f"{said}: back to the state of step {to.step}, positions {skipped[0]} to {skipped[1] - 1} are skipped; the"
        " same command goes on from there"
    )


if __name__ == "__main__":
    run_command(main)
