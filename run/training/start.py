"""The start of a run, from its command to an engine: the same for all that DeepSpeed trains."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from textwrap import shorten
from typing import Any

import torch.distributed as dist
from torch import nn

from mug.data.stream import Share
from mug.run.training import checkpoint, hardware
from mug.run.training.apex import check_apex
from mug.run.training.checkpoint import Checkpoint
from mug.run.training.console import Console
from mug.run.training.deepspeed_config import check_batch, load_deepspeed_config
from mug.run.training.engine import build_engine, recipe_values
from mug.run.training.errors import RunError
from mug.run.training.output import check_writable, lock
from mug.run.training.phases import Phases
from mug.run.training.recipe import Command, TrainerConfig, changes
from mug.run.training.restore import load_engine
from mug.run.training.sharded_state import SavedState, load_weights
from mug.run.training.watch import Watch

Description = dict[str, dict[str, Any]]  # what tells a model from another one, in sections


def prepare(command: Command, width: int, phases: Phases) -> tuple[Share, dict[str, Any]]:
    """This rank's share of each batch, and DeepSpeed's configuration for an encoder of `width`.

    Raises:
        RunError, DeepSpeedConfigError: what can be refused before anything is written.
    """
    trainer = command.recipe.trainer
    rank, world = hardware.rank_and_world()
    hardware.use_cores()
    check_batch(trainer.global_batch, trainer.micro_batch, world)
    phases.end("parse")
    import deepspeed  # noqa: F401  it takes seconds, which a mistake above need not wait for

    phases.end("import_deepspeed")
    ds_config = load_deepspeed_config(command.deepspeed, recipe_values(trainer, width, world))
    check_apex(trainer, ds_config)
    check_writable(command.output)
    return Share(trainer.global_batch, trainer.micro_batch, rank, world), ds_config


@contextlib.contextmanager
def watched_ranks(console: Console, hang_minutes: float, phases: Phases) -> Iterator[Watch]:
    """The process group, whose ranks watch over each other until all have left the `with` block."""
    hardware.init_distributed(timeout=timedelta(minutes=hang_minutes + 5))
    phases.end("process_group")
    with Watch(console, 60 * hang_minutes) as watch:
        yield watch
        dist.barrier()
    dist.destroy_process_group()


def open_output(command: Command, description: Description, console: Console, phases: Phases) -> Checkpoint | None:
    """Keep the run's folder to this run, log there, and find the checkpoint to go on from, if there is one.

    Raises:
        RunError: another run holds the folder; or the checkpoint is not of this run, see `find_checkpoint`.
    """
    hardware.on_rank_zero(lambda: lock(command.output))
    resumed = hardware.on_rank_zero(lambda: find_checkpoint(command, description, console))
    console.log_to(command.output / "logs" / f"rank{dist.get_rank()}.log")
    phases.end("find_checkpoint")
    return resumed


def find_checkpoint(command: Command, description: Description, console: Console) -> Checkpoint | None:
    """The checkpoint to go on from, of any number of ranks and any ZeRO stage.

    Raises:
        RunError: it is of a model that is not as in `description`, of another global batch, or of a recipe in which
            something else was to be learned.
    """
    found = checkpoint.resume(command.output, console.warn)
    if found is None:
        return None
    check_model(found, description, command.recipe.trainer.global_batch)
    check_changes(command, found, console)
    return found


def check_model(found: Checkpoint, description: Description, global_batch: int) -> None:
    """Raise RunError unless the checkpoint is of a model as in `description`, trained with this global batch."""
    for section, values in found.manifest["model"].items():
        for name, theirs in values.items():
            ours = description.get(section, {}).get(name)
            if name != "preset" and theirs != ours:
                raise RunError(
                    f"{found.folder} is a checkpoint of another model: {section} {name} is {_apart(theirs, ours)}"
                    f" there, {_apart(ours, theirs)} here; change the recipe back, or name another --output"
                )
    theirs = found.manifest["recipe"]["trainer"]["global_batch"]
    if theirs != global_batch:
        raise RunError(
            f"{found.folder} was written with global batch {theirs}, this run has {global_batch}; start it as it was,"
            " or name another --output"
        )


def _apart(value: Any, other: Any) -> str:
    """The value for a line; of a list, from where it differs from the other one."""
    if not (isinstance(value, list) and isinstance(other, list)):
        return shorten(str(value), 60)
    same = next((i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), min(len(value), len(other)))
    return f"of {len(value)}, from number {same + 1} on: {shorten(', '.join(map(str, value[same:])) or 'none', 60)}"


def check_changes(command: Command, found: Checkpoint, console: Console) -> None:
    """Raise RunError where the recipe's keys that decide what is learned have changed, unless that is allowed."""
    if not (changed := changes(found.manifest["recipe"], command.recipe)):
        return
    line = f"{found.folder} was trained with {', '.join(changed)}"
    if not command.allow_changes:
        raise RunError(f"{line}; change back, name another --output, or go on with --allow_changes true")
    console.warn(line)


def start_engine(
    model: nn.Module,
    ds_config: dict[str, Any],
    trainer: TrainerConfig,
    resumed: Checkpoint | None,
    phases: Phases,
    groups: list[dict[str, Any]] | None = None,
) -> Any:
    """DeepSpeed's engine around the model, in the state of the checkpoint if there is one; see `build_engine`."""
    if resumed:
        load_weights(model, SavedState(resumed.folder))
    phases.end("load_weights")
    engine = build_engine(model, ds_config, trainer, groups)
    phases.end("engine")
    if resumed:
        load_engine(engine, resumed)
    phases.end("load_optimizer")
    return engine
