"""From a checkpoint back to a model that stands alone."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mug.data.tokenizer import Tokenizer
from mug.model.mug import MUG, OBJECTIVES
from mug.model.presets import ModelConfig, Vocabulary
from mug.run.training import checkpoint
from mug.run.training.errors import RunError


def describe_model(objective: str, model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """What the manifest keeps, to build the model again and to tell it from another one."""
    return {
        "objective": {"name": objective, "seed": model.seed},
        "vocabulary": dataclasses.asdict(model.vocabulary),
        "config": dataclasses.asdict(model.config),
    }


def restore(path: Path, warn: Callable[[str], None]) -> tuple[MUG, Tokenizer, checkpoint.Checkpoint]:
    """The model and tokenizer of a checkpoint folder, or of the newest whole one of a run's folder.

    Weights are fp32, on the GPU if there is one.

    Raises:
        RunError: there is no checkpoint, or it is damaged.
    """
    named = (path / checkpoint.MANIFEST).is_file()
    found = checkpoint.verify(path) if named else checkpoint.newest(path, warn)
    if found is None:
        raise RunError(f"{path} holds no checkpoint; name a run's folder or one of its checkpoint-STEP folders")
    described = found.manifest["model"]
    model = OBJECTIVES[described["objective"]["name"]](
        ModelConfig(**described["config"]), Vocabulary(**described["vocabulary"]), described["objective"]["seed"]
    )
    model.load_state_dict(checkpoint.consolidated_weights(found))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), Tokenizer.load(found.folder / "tokenizer.json"), found
