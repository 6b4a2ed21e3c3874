#!/usr/bin/env python3
"""What is an encoder worth where every pixel counts? Fine-tune it with UperNet, as MAE's is on ADE20K.

    python run/segment.py --init runs/openmoji_tiny                # embedded scenes of OpenMoji's drawings
    torchrun --nproc-per-node 8 run/segment.py --config run/recipes/segment/ade20k_base.yaml \
        --init runs/NAME --data.folder ADEChallengeData2016

--init names a pre-training run or what else run/finetune.py takes; without it, training starts from scratch. The same
command again goes on where the run stopped. Plain PyTorch, not DeepSpeed: UperNet's batch norms keep statistics that
must not be rounded to bf16, and the model fits on one device; on GPUs it runs under autocast, with one batch norm over
all ranks. Needs transformers (the heads) and torchmetrics.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mug.data.stream import Batch, Share, TrainStream
from mug.model.segmenter import Segmenter
from mug.run.evaluation.records import add_result
from mug.run.finetuning.groups import layer_decay_groups
from mug.run.finetuning.initial import initial_encoder
from mug.run.segmentation.images import TrainScenes, WholeScenes, open_scenes
from mug.run.segmentation.recipe import SegmentCommand, SegmentRecipe, parse_command
from mug.run.segmentation.scoring import score
from mug.run.segmentation.state import read_state, write_state
from mug.run.training import checkpoint, hardware
from mug.run.training.console import Console, run_command
from mug.run.training.errors import Diverged, RunError
from mug.run.training.losses import Means, shares, total_loss
from mug.run.training.metrics import Meter, MetricsWriter, open_metrics
from mug.run.training.output import check_writable, lock
from mug.run.training.packages import load_package
from mug.run.training.schedule import LinearSchedule
from mug.run.training.start import check_model

EXTRA = "eval"


def main(console: Console) -> None:
    # --- Parse: all that can be refused is refused before anything is written ---
    command = parse_command()
    recipe, trainer = command.recipe, command.recipe.trainer
    for package in ("transformers", "torchmetrics"):
        load_package(package, EXTRA)
    rank, world = hardware.rank_and_world()
    hardware.use_cores()
    hardware.use_device()
    check_writable(command.output)
    if trainer.micro_batch * (world if torch.cuda.is_available() else 1) < 2:  # see spread_over_ranks
        raise RunError(
            "trainer.micro_batch is 1: batch norm after pooling to one pixel wants two images; give 2 or more"
        )

    # --- Data ---
    share = Share(trainer.global_batch, trainer.micro_batch, rank, world)
    stream = TrainStream(TrainScenes.open(recipe), share, recipe.data.workers)
    validation = WholeScenes(open_scenes(recipe, "validation"), recipe.model.encoder.image_size)

    # --- Model: of the newest whole checkpoint, if this output has one; else of the weights to begin with ---
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    begun = bool(hardware.on_rank_zero(lambda: checkpoint.list_folders(command.output)))
    model = build_model(recipe, begun, console).to(hardware.device())
    hardware.on_rank_zero(lambda: lock(command.output))
    resumed = hardware.on_rank_zero(lambda: find_checkpoint(command, console))
    console.log_to(command.output / "logs" / f"rank{rank}.log")
    groups = layer_decay_groups(model, trainer.weight_decay, trainer.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=trainer.betas)
    if resumed:
        read_state(resumed, model, optimizer)
        stream.load_state_dict(resumed.manifest["data"])

    # --- Loop ---
    done = resumed.step if resumed else 0
    run = Run(command, model, spread_over_ranks(model), optimizer, stream, validation, console)
    introduce(run, done)
    if done < trainer.max_steps:
        train(run, done)
    dist.barrier()
    dist.destroy_process_group()


# --- Model ------------------------------------------------------------------------------------------------


def find_checkpoint(command: SegmentCommand, console: Console) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from.

    Raises:
        RunError: it is of another model or batch.
    """
    found = checkpoint.resume(command.output, console.warn)
    if found is not None:
        check_model(found, describe(command.recipe), command.recipe.trainer.global_batch)
    return found


def describe(recipe: SegmentRecipe) -> dict[str, dict[str, Any]]:
    """What tells the model from another one."""
    return {"segmenter": dataclasses.asdict(recipe.model)}


def build_model(recipe: SegmentRecipe, begun: bool, console: Console) -> Segmenter:
    """The model; unless the run has `begun`, its encoder with the weights to begin with. The same on all ranks."""
    of, sizes = recipe.model, recipe.model.encoder
    encoder = initial_encoder(sizes, None if begun else recipe.init, recipe.seed, console.warn)
    return Segmenter(encoder, sizes, of.classes, of.channels, of.drop_path, recipe.seed)


def spread_over_ranks(model: Segmenter) -> nn.Module:
    """What a training step calls: gradients are averaged over the ranks, on GPUs also the batch norms' statistics."""
    if dist.get_world_size() == 1:
        return model
    if torch.cuda.is_available():
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)  # or rank 0's statistics would win


# --- Loop -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop works with; `spread` is the model, or DDP around it."""

    command: SegmentCommand
    model: Segmenter
    spread: nn.Module
    optimizer: torch.optim.AdamW
    stream: TrainStream
    validation: WholeScenes
    console: Console

    @property
    def recipe(self) -> SegmentRecipe:
        return self.command.recipe


def introduce(run: Run, done: int) -> None:
    """Say what is about to be trained, on what, from where to where."""
    recipe, say = run.recipe, run.console.say
    parameters = sum(p.numel() for p in run.model.parameters())
    say(f"UperNet of {recipe.model.classes} classes, {parameters / 1e6:.1f}M parameters, {run.command.output}")
    say(f"{run.stream.samples:,} training, {len(run.validation.scenes):,} validation images")
    say(f"{recipe.trainer.max_steps:,} steps of {recipe.trainer.global_batch}, {hardware.describe_device()}")
    if done >= recipe.trainer.max_steps:
        say(f"step {done} was the last one; raise trainer.max_steps or name another --output to train more")
    else:
        say(f"going on after step {done}" if done else f"beginning from {recipe.init or 'random weights'}")


def train(run: Run, done: int) -> None:
    """Train from step `done` to the end, with metrics, evaluations and checkpoints on the way."""
    trainer, recipe = run.recipe.trainer, run.recipe
    total = trainer.max_steps * trainer.global_batch
    schedule = LinearSchedule(trainer.learning_rate, trainer.warmup_samples, total)
    meter = Meter(trainer.global_batch)
    run.console.start_bar(trainer.max_steps, done)
    with open_metrics(run.command.output, done) as metrics:
        batches = iter(run.stream)
        for step in range(done + 1, trainer.max_steps + 1):
            last = step == trainer.max_steps
            with meter.waiting():
                micro_batches = next(batches)
            learning_rate = schedule((step - 0.5) * trainer.global_batch)
            means, norm = train_step(run, micro_batches, learning_rate)
            run.stream.advance()
            line, to_save = None, step % recipe.checkpoint.every_steps == 0 or last
            if step % trainer.log_every == 0 or to_save:
                figures = {**means.reduce(recipe.loss_weights), "lr": learning_rate, "grad_norm": norm, **meter.read()}
                line = log_step(run, metrics, step, figures)
            run.console.step(step, line)
            with meter.pausing():
                if step % trainer.eval_every == 0 or last:
                    evaluate(run, metrics, step)
                if to_save:
                    save(run, metrics, step)


def train_step(run: Run, micro_batches: list[Batch], learning_rate: float) -> tuple[Means, float]:
    """One optimizer step over this rank's micro-batches; the figures it was made of, and the gradient's norm."""
    counts, means = [run.model.counts(batch) for batch in micro_batches], Means()
    weights, device = run.recipe.loss_weights, hardware.device()
    for batch, count, share in zip(micro_batches, counts, shares(counts, run.model.terms), strict=True):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses, report = run.spread(hardware.to_device(batch))
        loss = total_loss(losses, weights, dict(zip(run.model.terms, share, strict=True)))
        (loss / len(micro_batches)).backward()
        means.add(losses, report, count)
    norm = nn.utils.get_total_norm(p.grad for p in run.model.parameters() if p.grad is not None)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
    run.optimizer.step()
    run.optimizer.zero_grad()
    return means, norm.item()


def log_step(run: Run, metrics: MetricsWriter | None, step: int, figures: dict[str, float]) -> str:
    """Write a step's row; returns its line for the terminal.

    Raises:
        Diverged: the loss or the gradient is not finite; no checkpoint holds what it led to.
    """
    if metrics:
        metrics.write("train", step, {"position": run.stream.next_position, **figures})
    if not math.isfinite(figures["loss/total"] + figures["grad_norm"]):
        raise Diverged(f"loss or gradient of step {step} is not finite; no checkpoint holds what it led to")
    return f"loss {figures['loss/total']:.4f}  lr {figures['lr']:.2e}  {figures['images_per_s']:.1f} images/s"


def evaluate(run: Run, metrics: MetricsWriter | None, step: int) -> None:
    """Mean IoU on whole validation images; at the end also among the run's results."""
    recipe = run.recipe
    same_statistics(run.model)
    figures = score(run.model, run.validation, recipe.trainer.eval_samples, recipe.data.workers)
    run.console.say(f"step {step}  validation: " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    if metrics:
        metrics.write("eval", step, {"position": run.stream.next_position, **figures})
        if step == recipe.trainer.max_steps:
            data, encoder = recipe.data.folder or "OpenMoji scenes", recipe.init or "random weights"
            add_result(run.command.output, {"method": "UperNet", "encoder": encoder, "data": data, **figures})


def same_statistics(model: nn.Module) -> None:
    """Average the batch norms' running statistics over the ranks, which keep their own on CPUs."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


def save(run: Run, metrics: MetricsWriter | None, step: int) -> None:
    """Save weights, statistics, optimizer and the data's state."""
    if metrics:
        metrics.flush()
    same_statistics(run.model)
    recipe = run.recipe
    manifest = {
        "model": describe(recipe),
        "recipe": dataclasses.asdict(recipe),
        "data": run.stream.state_dict(),
        "world_size": dist.get_world_size(),
    }
    keep = recipe.checkpoint.keep
    hardware.on_rank_zero(lambda: write_state(run.command.output, step, run.model, run.optimizer, manifest, keep))


if __name__ == "__main__":
    run_command(main)
