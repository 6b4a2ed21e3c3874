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
import math
import os
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mug.data.ledger import Ledger
from mug.data.stream import Batch, Share, TrainStream, open_held_out, open_train
from mug.model.mug import OBJECTIVES
from mug.model.presets import Vocabulary
from mug.run.training import checkpoint, hardware
from mug.run.training.apex import check_apex
from mug.run.training.console import Console, run_command
from mug.run.training.deepspeed_config import check_batch, load_deepspeed_config
from mug.run.training.engine import build_engine, recipe_values, set_learning_rate, whole_weights
from mug.run.training.errors import RunError
from mug.run.training.evaluation import HeldOut
from mug.run.training.losses import Means, shares, total_loss
from mug.run.training.metrics import Meter, MetricsWriter, WaitAlarm
from mug.run.training.phases import Phases
from mug.run.training.recipe import Command, Recipe, parse_command
from mug.run.training.restore import describe_model, load_engine
from mug.run.training.saver import Saver
from mug.run.training.schedule import CosineSchedule
from mug.run.training.sharded_state import SavedState, load_weights


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
    steps = count_steps(recipe, stream.samples)
    phases.end("data")

    # --- Model ---
    hardware.init_distributed()
    phases.end("process_group")
    model = build_objective(recipe, vocabulary_of(stream))
    phases.end("model")

    # --- Resume: the newest whole checkpoint, if this output has one of this model ---
    resumed = hardware.on_rank_zero(lambda: find_checkpoint(command, model, console))
    hardware.on_rank_zero(lambda: lock(command.output))
    console.log_to(command.output / "logs" / f"rank{rank}.log")
    phases.end("find_checkpoint")

    # --- Engine ---
    if resumed:
        load_weights(model, SavedState(resumed.folder))
    phases.end("load_weights")
    engine = build_engine(model, ds_config, recipe.trainer)
    phases.end("engine")
    if resumed:
        load_engine(engine, resumed)
        stream.load_state_dict(resumed.manifest["data"])
    phases.end("load_optimizer")
    ledger = open_ledger(command, stream, resumed)

    # --- Loop ---
    if held_out is not None:
        held_out = HeldOut(held_out, recipe.trainer.eval_samples, recipe.trainer.micro_batch, recipe.data.workers)
    run = Run(command, engine, stream, ledger, held_out, steps, console, phases)
    introduce(run, resumed)
    done = resumed.step if resumed else 0
    if done < steps:
        train(run, done)
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
    found = checkpoint.newest(command.output, console.warn)
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
    return found


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
        raise RunError(f"--output {output}: another run is writing there; end it, or name another folder") from None


# --- Loop -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop works with."""

    command: Command
    engine: Any
    stream: TrainStream
    ledger: Ledger
    held_out: HeldOut | None
    steps: int
    console: Console
    phases: Phases

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


def train(run: Run, done: int) -> None:
    """Train from step `done` to the end, with metrics, evaluations and checkpoints on the way."""
    trainer = run.recipe.trainer
    schedule = CosineSchedule(
        trainer.learning_rate,
        trainer.min_learning_rate,
        trainer.warmup_samples,
        run.steps * trainer.global_batch,
    )
    meter = Meter(run.recipe, run.engine.module.vocabulary)
    alarm = WaitAlarm(run.recipe.data.workers)
    run.console.start_bar(run.steps, done)
    with open_metrics(run, done) as metrics:
        saver = Saver(run.engine, run.command.output, run.recipe.checkpoint, partial(record_save, metrics))
        run.phases.end("metrics")
        batches = iter(run.stream)
        for step in range(done + 1, run.steps + 1):
            last = step == run.steps
            with meter.waiting():
                micro_batches = next(batches)
            meter.count(micro_batches)
            run.phases.end("first_batch")
            learning_rate = schedule((step - 0.5) * trainer.global_batch)
            set_learning_rate(run.engine, learning_rate)
            means = train_step(run.engine, micro_batches, run.recipe.loss_weights)
            run.phases.end("first_step")
            if metrics and step == done + 1:
                metrics.write("event", done, {"event": "resume" if done else "start", **circumstances(run)})
            run.stream.advance()
            line, logged = None, step % trainer.log_every == 0
            to_save = last or step % run.recipe.checkpoint.every_steps == 0 or (logged and saver.time_is_up())
            if logged or to_save:
                figures = {**means.reduce(run.recipe.loss_weights), "lr": learning_rate, **meter.read()}
                line = log_step(run, metrics, step, figures)
                if late := alarm.check(figures["data_wait"]):
                    run.console.warn(late)
            run.console.step(step, line)
            with meter.pausing():
                if run.held_out and (step % trainer.eval_every == 0 or last):
                    evaluate(run, metrics, step)
                if to_save:
                    save(run, saver, metrics, step)
                elif logged:
                    saver.poll()
        saver.finish()


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
        **{name: version(name) for name in ("torch", "deepspeed", "timm")},
        **run.phases.figures(),
    }


def open_metrics(run: Run, done: int) -> contextlib.AbstractContextManager[MetricsWriter | None]:
    """The writer on rank 0, nothing on the others."""
    if dist.get_rank() > 0:
        return contextlib.nullcontext()
    return MetricsWriter(run.command.output, done)


def log_step(run: Run, metrics: MetricsWriter | None, step: int, figures: dict[str, float]) -> str:
    """Write a step's row; returns its line for the terminal.

    Raises:
        ArithmeticError: the loss or the gradient is not finite; no later checkpoint holds what it led to.
    """
    replaced = hardware.gather(run.stream.take_replaced())
    hardware.on_rank_zero(lambda: run.ledger.add(replaced, run.stream.next_position))
    figures["replaced"] = run.ledger.entries
    norm = run.engine.get_global_grad_norm()
    figures["grad_norm"] = None if norm is None else float(norm)
    if metrics:
        metrics.write("train", step, {"position": run.stream.next_position, **figures})
    if not math.isfinite(figures["loss/total"]) or not math.isfinite(figures["grad_norm"] or 0):
        raise ArithmeticError(f"loss or gradient of step {step} is not finite: {figures}")
    return _line(figures) + f"  lr {figures['lr']:.2e}  {figures['images_per_s']:.0f} images/s"


def evaluate(run: Run, metrics: MetricsWriter | None, step: int) -> None:
    """Held-out losses, and a picture drawn from a whole copy of the weights on rank 0."""
    figures = run.held_out.evaluate(run.engine, run.recipe.loss_weights)
    run.console.say(f"step {step}  held out: {_line(figures)}")
    weights = whole_weights(run.engine)
    if metrics:
        metrics.write("eval", step, {"position": run.stream.next_position, **figures})
        objective = run.engine.module
        copy = type(objective)(objective.config, objective.vocabulary, objective.seed)
        copy.load_state_dict(weights)
        run.held_out.draw(copy, run.command.output / "samples" / f"step-{step}.png")
    dist.barrier()


def _line(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if name.startswith(("loss/", "acc")))


def save(run: Run, saver: Saver, metrics: MetricsWriter | None, step: int) -> None:
    """Save weights, optimizer, the data's state, and what generate.py needs."""
    if metrics:
        metrics.flush()
    state = {
        "model": describe_model(run.recipe.objective, run.engine.module),
        "recipe": dataclasses.asdict(run.recipe),
        "data": run.stream.state_dict() | {"ledger": run.ledger.state_dict()},
        "world_size": dist.get_world_size(),
        "zero_stage": run.engine.zero_optimization_stage(),
    }
    saver.save(step, state, {"tokenizer.json": run.stream.tokenizer.to_json()})


def record_save(metrics: MetricsWriter | None, step: int, seconds: dict[str, float]) -> None:
    if metrics:
        metrics.write("event", step, {"event": "checkpoint", **seconds})


if __name__ == "__main__":
    run_command(main)
