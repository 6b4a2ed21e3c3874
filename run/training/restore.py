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
from mug.run.training.sharded_state import SavedState, engine_digests, load_optimizer, load_weights


def describe_model(objective: str, model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """What the manifest keeps, to build the model again and to tell it from another one."""
    return {
        "objective": {"name": objective, "seed": model.seed},
        "vocabulary": dataclasses.asdict(model.vocabulary),
        "config": dataclasses.asdict(model.config),
    }


def load_engine(engine: Any, found: checkpoint.Checkpoint) -> None:
    """Restore the optimizer's state and the engine's counters on all ranks, the model having its weights already.

    AdamW's settings stay those of this run.

    Raises:
        RunError: what this run's ranks now hold is not what was saved.
    """
    load_optimizer(engine, SavedState(found.folder), found.manifest["adam_steps"])
    engine.global_steps, engine.global_samples = found.step, found.step * engine.train_batch_size()
    if (held := engine_digests(engine)) != found.manifest["digests"]:
        raise RunError(
            f"{found.folder} gave {held} where {found.manifest['digests']} was saved; does the DeepSpeed JSON now ask"
            " for another precision of the optimizer's state?"
        )


def find(path: Path, warn: Callable[[str], None]) -> checkpoint.Checkpoint:
    """The checkpoint in a folder, or the newest whole one of a run's folder.

    Raises:
        RunError: there is none, or it is damaged.
    """
    named = (path / checkpoint.MANIFEST).is_file()
    found = checkpoint.verify(path) if named else checkpoint.newest(path, warn)
    if found is None:
        raise RunError(f"{path} holds no checkpoint; name a run's folder or one of its checkpoint-STEP folders")
    return found


def restore(path: Path, warn: Callable[[str], None]) -> tuple[MUG, Tokenizer, checkpoint.Checkpoint]:
    """The model and tokenizer of a checkpoint folder, or of the newest whole one of a run's folder.

    Weights are fp32, on the GPU if there is one. The model's `terms` are those that it was trained on.

    Raises:
        RunError: there is no checkpoint, or it is damaged, or of something else than a pre-training run.
    """
    found = find(path, warn)
    described = found.manifest["model"]
    if "objective" not in described:
        raise RunError(f"{found.folder} is no checkpoint of a pre-training run; name one")
    model = OBJECTIVES[described["objective"]["name"]](
        ModelConfig(**described["config"]),
        Vocabulary(**described["vocabulary"]),
        described["objective"]["seed"],
        tuple(term for term, weight in found.manifest["recipe"]["loss_weights"].items() if weight),
    )
    load_weights(model, SavedState(found.folder))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), Tokenizer.load(found.folder / "tokenizer.json"), found
