"""When pre-training goes wrong: a step that is not finite is stopped at or skipped, a loss spike undone."""

import dataclasses

import torch
import torch.distributed as dist

from mug.data.stream import Batch
from mug.run.training import bundle, hardware
from mug.run.training.bundle import Bundle, MicroBatch
from mug.run.training.errors import Diverged, Restart
from mug.run.training.loop import Log, Run, note_replaced, save, versions
from mug.run.training.losses import Means
from mug.run.training.spikes import rewind


def skip_or_stop(run: Run, log: Log, step: int, micro_batches: list[Batch], means: Means) -> None:
    """Deal with a step whose loss or gradient is not finite. No rank has updated anything.

    Raises:
        Diverged: safety.nonfinite is stop, or this happened too often.
    """
    log.saver.finish()
    before = _keep_state_before(run, log, step)
    written = _bundle(run, step, before, micro_batches, means)
    path = hardware.on_rank_zero(lambda: bundle.write(run.command.output, written))
    line = f"loss or gradient of step {step} is not finite; nothing was updated; see it again: run/replay.py {path}"
    if run.recipe.safety.nonfinite == "stop" or len(run.stream.skipped) >= run.recipe.safety.max_skips:
        raise Diverged(line)
    run.stream.skip()
    run.console.warn(f"{line}; its batch is skipped")
    log.event(step, "skip", {"positions": run.stream.skipped[-1], "bundle": str(path)})


def _keep_state_before(run: Run, log: Log, step: int) -> str | None:
    """The name of the checkpoint of the step before, which is written if it is not there; None at the first step."""
    if step == 1:
        return None
    name = f"checkpoint-{step - 1}"
    if not hardware.on_rank_zero((run.command.output / name).is_dir):
        note_replaced(run)
        save(run, log, step - 1)
        log.saver.finish()
    return name


def _bundle(run: Run, step: int, before: str | None, micro_batches: list[Batch], means: Means) -> Bundle:
    """What run/replay.py needs, of all ranks."""
    ran = [
        MicroBatch(dist.get_rank(), _range_of(batch["position"]), {term: loss.item() for term, loss in losses.items()})
        for batch, losses in zip(micro_batches, means.micro_batches, strict=True)
    ]
    return Bundle(
        step=step,
        checkpoint=before,
        deepspeed=str(run.command.deepspeed),
        world_size=dist.get_world_size(),
        zero_stage=run.engine.zero_optimization_stage(),
        recipe=dataclasses.asdict(run.recipe),
        micro_batches=hardware.gather(ran),
        versions=versions(),
    )


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
