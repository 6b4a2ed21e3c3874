"""A segmentation run's checkpoint: weights, running statistics and AdamW's moments, as safetensors.

The model fits on one device, so rank 0 writes all of it, under the commit protocol of mug.run.training.checkpoint.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mug.run.training import checkpoint

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


def write_state(
    output: Path, step: int, model: nn.Module, optimizer: torch.optim.AdamW, manifest: dict[str, Any], keep: int
) -> None:
    """Commit OUTPUT/checkpoint-STEP."""
    partial = checkpoint.open_partial(output, step)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, partial / MODEL)
    moments = {
        f"{moment}/{name}": optimizer.state[parameter][moment].contiguous()
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
    }
    save_file(moments, partial / OPTIMIZER)
    seals = {name: checkpoint.seal(partial / name) for name in (MODEL, OPTIMIZER)}
    checkpoint.commit(output, step, seals, manifest, {}, keep)


def read_state(found: checkpoint.Checkpoint, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Make model and optimizer what they were."""
    model.load_state_dict(load_file(found.folder / MODEL))
    moments = load_file(found.folder / OPTIMIZER)
    for name, parameter in model.named_parameters():
        state = {moment: moments[f"{moment}/{name}"].to(parameter.device) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(found.step)), **state}
