"""What an objective keeps outside its parameters, such as a batch norm's statistics: the same on all ranks."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mug.model.objectives.objective import Objective
from mug.run.common.errors import RunError

EXTRA = "extra.safetensors"


def copy_extra_state(model: Objective) -> dict[str, Tensor]:
    """Returns the current extra state, on the host."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in model.extra_state().items()}


def write_extra_state(folder: Path, state: dict[str, Tensor]) -> None:
    """Write FOLDER/extra.safetensors, each tensor in its own precision."""
    save_file(state, folder / EXTRA)


@torch.no_grad()
def load_extra_state(model: Objective, folder: Path) -> None:
    """Give the objective the extra state of a checkpoint, if it has any.

    Raises:
        RunError: what was saved does not have the names and shapes that this objective keeps.
    """
    ours = model.extra_state()
    saved = load_file(folder / EXTRA) if (folder / EXTRA).is_file() else {}
    for name in sorted(ours.keys() | saved.keys()):
        here, there = (list(state[name].shape) if name in state else "missing" for state in (ours, saved))
        if here != there:
            raise RunError(f"{folder}: extra state {name} is {there} there, {here} in this objective")
    if ours:
        model.load_extra_state({name: value.to(ours[name].device, copy=True) for name, value in saved.items()})
