"""When training goes wrong: a step that is not finite stops the run or is skipped, a loss spike is rolled back."""

import torch
import torch.distributed as dist

from mug.data.kinds.samples import Batch
from mug.run.cluster import hardware
from mug.run.cluster.losses import WeightedMeans
from mug.run.common.errors import Diverged, RestartRequested
from mug.run.state import replay_bundle as bundle
from mug.run.state.replay_bundle import Bundle, MicroBatch
from mug.run.training.recipe import recorded
from mug.run.training.run import Log, Run, flush_bad_samples, save, versions
from mug.run.training.spikes import rollback


def handle_nonfinite(run: Run, log: Log, step: int, micro_batches: list[Batch], means: WeightedMeans) -> None:
    """Deal with a step whose loss or gradient is not finite. No rank has updated anything.

    Raises:
        Diverged: faults.nonfinite is stop, or this happened too often.
    """
    log.saver.finish()
    before = _keep_state_before(run, log, step)
    written = _bundle(run, step, before, micro_batches, means)
    path = hardware.on_rank_zero(lambda: bundle.write(run.command.output, written))
    line = f"loss or gradient of step {step} is not finite; nothing was updated; to reproduce it: run/replay.py {path}"
    if run.recipe.faults.nonfinite == "stop" or len(run.stream.skipped) >= run.recipe.faults.max_skips:
        raise Diverged(line)
    run.stream.skip()
    run.console.warn(f"{line}; its batch is skipped")
    log.event(step, "skip", {"positions": run.stream.skipped[-1], "bundle": str(path)})


def _keep_state_before(run: Run, log: Log, step: int) -> str | None:
    """Returns the name of the previous step's checkpoint, which is written if it is missing; None at the first step."""
    if step == 1:
        return None
    name = f"checkpoint-{step - 1}"
    if not hardware.on_rank_zero((run.command.output / name).is_dir):
        flush_bad_samples(run)
        save(run, log, step - 1)
        log.saver.finish()
    return name


def _bundle(run: Run, step: int, before: str | None, micro_batches: list[Batch], means: WeightedMeans) -> Bundle:
    """Returns what run/replay.py needs, of all ranks."""
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
        recipe=recorded(run.recipe),
        micro_batches=hardware.gather(ran),
        versions=versions(),
    )


def _range_of(position_B: torch.Tensor) -> tuple[int, int, int]:
    """Returns the positions of a micro-batch, int64 [B], as the arguments of a range."""
    first, *others = position_B.tolist()
    stride = others[0] - first if others else 1
    return first, first + len(position_B) * stride, stride


def rollback_on_spike(run: Run, log: Log, step: int, loss: float) -> None:
    """Undo a loss spike, and skip the batches that led to it.

    Raises:
        RestartRequested: a checkpoint of this step was made from an earlier one.
        Diverged: there is none, or this happened too often.
    """
    log.saver.finish()
    faults = run.recipe.faults
    line = f"the loss of step {step}, {loss:.4g}, is a spike (faults.spike_factor {faults.spike_factor:g})"
    if len(run.stream.skipped) >= faults.max_skips:
        raise Diverged(f"{line}, and faults.max_skips {faults.max_skips} is reached")
    to = hardware.on_rank_zero(
        lambda: rollback(
            run.command.output, faults.spike_checkpoints, step, run.stream.next_position, run.recipe.checkpoint.keep
        )
    )
    if to is None:
        raise Diverged(f"{line}, and there is no checkpoint yet to roll back to")
    skipped = [to.manifest["data"]["next_position"], run.stream.next_position]
    if log.metrics:
        log.metrics.truncate_after(to.step)
    log.event(step, "rollback", {"to": to.step, "positions": skipped})
    raise RestartRequested(
        f"{line}: rolled back to the state of step {to.step}, positions {skipped[0]} to {skipped[1] - 1} are skipped;"
        " rerun the same command to resume"
    )
