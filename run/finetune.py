#!/usr/bin/env python3
"""Fine-tune an encoder end to end on labelled images, with MAE's recipe, on DeepSpeed.

    deepspeed run/finetune.py --deepspeed ds_configs/zero1.json --config run/recipes/finetune/imagenet1k_base.yaml \
        --init runs/web200m_base --data.images imagenet
    python run/finetune.py --deepspeed ds_configs/zero1.json --init runs/NAME      # Fashion-MNIST

--init names a pre-training run, one of its checkpoints (written by any number of ranks, under any ZeRO stage), or a
file in timm's, MAE's or transformers' layout; without it, training starts from scratch. The same command again goes on
where the run stopped. Any key of the recipe can be changed: python run/finetune.py --help.
"""

import dataclasses
from functools import partial
from typing import Any

import torch.distributed as dist

from mug.data.stream import Share, TrainStream
from mug.model.classifier import Classifier
from mug.model.flops import classifier_flops
from mug.run.evaluation.datasets import open_splits
from mug.run.finetuning.groups import layer_decay_groups
from mug.run.finetuning.images import open_images
from mug.run.finetuning.initial import initial_encoder
from mug.run.finetuning.recipe import FinetuneRecipe, parse_command
from mug.run.pretrain import check_changes, check_writable, count_steps, lock, train_step
from mug.run.training import checkpoint, hardware
from mug.run.training.console import Console, run_command
from mug.run.training.deepspeed_config import check_batch, load_deepspeed_config
from mug.run.training.engine import build_engine, recipe_values, set_learning_rate
from mug.run.training.errors import Diverged, RunError
from mug.run.training.evaluation import HeldOut
from mug.run.training.metrics import Meter, MetricsWriter, WaitAlarm, open_metrics
from mug.run.training.recipe import Command
from mug.run.training.restore import load_engine
from mug.run.training.saver import Saver
from mug.run.training.schedule import CosineSchedule
from mug.run.training.sharded_state import SavedState, load_weights

WEIGHTS = {"class": 1.0}


def main(console: Console) -> None:
    # --- Parse: all that can be refused is refused before anything is written ---
    command = parse_command()
    recipe: FinetuneRecipe = command.recipe
    rank, world = hardware.rank_and_world()
    hardware.use_cores()
    trainer, sizes = recipe.trainer, recipe.model.encoder
    check_batch(trainer.global_batch, trainer.micro_batch, world)
    ds_config = load_deepspeed_config(command.deepspeed, recipe_values(trainer, sizes.width, world))
    check_writable(command.output)

    # --- Data ---
    splits = open_splits(recipe.data.images, recipe.data.test, recipe.data.label, recipe.data.cache)
    stream, test = open_images(recipe, splits, Share(trainer.global_batch, trainer.micro_batch, rank, world))
    steps = count_steps(recipe, stream.samples)

    # --- Model: of the newest whole checkpoint, if this output has one; else of the weights to begin with ---
    hardware.init_distributed()
    description = {"config": dataclasses.asdict(sizes), "classifier": {"pool": recipe.model.pool, "names": test.names}}
    resumed = hardware.on_rank_zero(lambda: find_checkpoint(command, description, console))
    model = build_model(recipe, len(test.names), resumed, console)
    hardware.on_rank_zero(lambda: lock(command.output))
    console.log_to(command.output / "logs" / f"rank{rank}.log")

    # --- Engine ---
    groups = layer_decay_groups(model, trainer.weight_decay, trainer.layer_decay)
    engine = build_engine(model, ds_config, trainer, groups)
    if resumed:
        load_engine(engine, resumed)
        stream.load_state_dict(resumed.manifest["data"])

    # --- Loop ---
    held_out = HeldOut(test, trainer.eval_samples, trainer.micro_batch, recipe.data.workers)
    run = Run(command, engine, stream, held_out, steps, description, console)
    introduce(run, resumed)
    done = resumed.step if resumed else 0
    if done < steps:
        train(run, done)
    dist.barrier()
    dist.destroy_process_group()


# --- Model ------------------------------------------------------------------------------------------------


def find_checkpoint(command: Command, description: dict, console: Console) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, of any number of ranks and any ZeRO stage.

    Raises:
        RunError: it is of another model, of other classes, or has another global batch.
    """
    found = checkpoint.resume(command.output, console.warn)
    if found is None:
        return None
    for section, values in description.items():
        for name, ours in values.items():
            theirs = found.manifest["model"].get(section, {}).get(name)
            if name != "preset" and theirs != ours:
                shown = "other classes" if name == "names" else f"{name} {theirs}, not {ours}"
                raise RunError(f"{found.folder} has {shown}; change the recipe back, or name another --output")
    theirs, ours = found.manifest["recipe"]["trainer"]["global_batch"], command.recipe.trainer.global_batch
    if theirs != ours:
        raise RunError(
            f"{found.folder} was written with global batch {theirs}, this run has {ours}; start it as it was, or"
            " name another --output"
        )
    check_changes(command, found, console)
    return found


def build_model(
    recipe: FinetuneRecipe, classes: int, resumed: checkpoint.Checkpoint | None, console: Console
) -> Classifier:
    """The classifier with the weights it goes on from, or begins with; the same on all ranks."""
    sizes, of = recipe.model.encoder, recipe.model
    encoder = initial_encoder(sizes, None if resumed else recipe.init, recipe.seed, console.warn)
    model = Classifier(encoder, sizes, classes, of.pool, of.drop_path, recipe.seed)
    if resumed:
        load_weights(model, SavedState(resumed.folder))
    return model


# --- Loop -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop works with."""

    command: Command
    engine: Any
    stream: TrainStream
    held_out: HeldOut
    steps: int
    description: dict[str, dict[str, Any]]
    console: Console

    @property
    def recipe(self) -> FinetuneRecipe:
        return self.command.recipe


def introduce(run: Run, resumed: checkpoint.Checkpoint | None) -> None:
    """Say what is about to be trained, on what, from where to where."""
    recipe, say, share = run.recipe, run.console.say, run.stream.share
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.parameters())
    names = run.description["classifier"]["names"]
    say(f"classifier of {len(names)} classes, {parameters / 1e6:.1f}M parameters, {run.command.output}")
    say(f"{run.stream.samples:,} images an epoch, {run.steps:,} steps of {share.global_batch}")
    say(f"{share.world} rank(s) on {hardware.describe_device()}, ZeRO stage {run.engine.zero_optimization_stage()}")
    if resumed and resumed.step >= run.steps:
        say(f"step {resumed.step} was the last one; raise trainer.max_steps or name another --output to train more")
    elif resumed:
        say(f"going on after step {resumed.step} from {resumed.folder}")
    else:
        say(f"beginning from {recipe.init or 'random weights'}")


def train(run: Run, done: int) -> None:
    """Train from step `done` to the end, with metrics, evaluations and checkpoints on the way."""
    trainer = run.recipe.trainer
    schedule = CosineSchedule(
        trainer.learning_rate, trainer.min_learning_rate, trainer.warmup_samples, run.steps * trainer.global_batch
    )
    classes = len(run.description["classifier"]["names"])
    meter = Meter(trainer.global_batch)
    step_flops = classifier_flops(run.recipe.model.encoder, classes) * trainer.global_batch / dist.get_world_size()
    alarm = WaitAlarm(run.recipe.data.workers)
    run.console.start_bar(run.steps, done)
    with open_metrics(run.command.output, done) as metrics:
        saver = Saver(run.engine, run.command.output, run.recipe.checkpoint, partial(record_save, metrics))
        batches = iter(run.stream)
        for step in range(done + 1, run.steps + 1):
            last = step == run.steps
            with meter.waiting():
                micro_batches = next(batches)
            meter.count(step_flops)
            learning_rate = schedule((step - 0.5) * trainer.global_batch)
            set_learning_rate(run.engine, learning_rate)
            means = train_step(run.engine, micro_batches, WEIGHTS)
            if not run.engine.was_step_applied():
                raise Diverged(f"loss or gradient of step {step} is not finite; nothing was updated")
            run.stream.advance()
            line, logged = None, step % trainer.log_every == 0
            to_save = last or step % run.recipe.checkpoint.every_steps == 0 or (logged and saver.time_is_up())
            if logged or to_save:
                figures = {**means.reduce(WEIGHTS), "lr": learning_rate, **meter.read()}
                line = log_step(run, metrics, step, figures)
                if late := alarm.check(figures["data_wait"]):
                    run.console.warn(late)
            run.console.step(step, line)
            with meter.pausing():
                if step % trainer.eval_every == 0 or last:
                    evaluate(run, metrics, step)
                if to_save:
                    save(run, saver, metrics, step)
                elif logged:
                    saver.poll()
        saver.finish()


def log_step(run: Run, metrics: MetricsWriter | None, step: int, figures: dict[str, float]) -> str:
    """Write a step's row; returns its line for the terminal."""
    norm = run.engine.get_global_grad_norm()
    figures["grad_norm"] = None if norm is None else float(norm)
    if metrics:
        metrics.write("train", step, {"position": run.stream.next_position, **figures})
    return f"loss {figures['loss/total']:.4f}  lr {figures['lr']:.2e}  {figures['images_per_s']:.0f} images/s"


def evaluate(run: Run, metrics: MetricsWriter | None, step: int) -> None:
    """Loss and accuracy on the test images."""
    figures = run.held_out.evaluate(run.engine, WEIGHTS)
    top1, top5 = (100 * figures[name] for name in ("accuracy/class", "accuracy5/class"))
    run.console.say(f"step {step}  test: loss {figures['loss/total']:.4f}  top-1 {top1:.2f}%  top-5 {top5:.2f}%")
    if metrics:
        metrics.write("eval", step, {"position": run.stream.next_position, **figures})


def save(run: Run, saver: Saver, metrics: MetricsWriter | None, step: int) -> None:
    """Save weights, optimizer and the data's state."""
    if metrics:
        metrics.flush()
    state = {
        "model": run.description,
        "recipe": dataclasses.asdict(run.recipe),
        "data": run.stream.state_dict(),
        "world_size": dist.get_world_size(),
        "zero_stage": run.engine.zero_optimization_stage(),
    }
    saver.save(step, state, {})


def record_save(metrics: MetricsWriter | None, step: int, seconds: dict[str, float]) -> None:
    if metrics:
        metrics.write("event", step, {"event": "checkpoint", **seconds})


if __name__ == "__main__":
    run_command(main)
