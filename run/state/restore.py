"""Restores a model, or a run's state, from a checkpoint."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mug.data.tokenizer import Tokenizer
from mug.model.objectives.objective import Context, Objective, find_objective, name_of
from mug.model.presets import Vocabulary
from mug.run.cluster import hardware
from mug.run.common.errors import RunError
from mug.run.state import checkpoint
from mug.run.state.extra_state import load_extra_state
from mug.run.state.sharded_state import SavedState, engine_digests, load_optimizer, load_weights


def describe_model(model: Objective) -> dict[str, Any]:
    """Returns the manifest's description of the model, to rebuild and to identify it: values as JSON has them."""
    described = {
        "objective": name_of(type(model)),
        "config": dataclasses.asdict(model.config),
        "context": dataclasses.asdict(model.context),
    }
    return json.loads(json.dumps(described))  # lists, not tuples, so that it equals what a manifest gives back


def build_objective(name: str, config: Any, context: Context) -> Objective:
    """Returns the objective of this name with freshly drawn weights.

    Raises:
        ObjectiveError: it does not exist.
        ModelConfigError: its sizes do not fit the data.
    """
    return find_objective(name)(config, context)


def model_of(manifest: dict[str, Any]) -> Objective:
    """Returns the objective that a manifest describes, with freshly drawn weights."""
    described = manifest["model"]
    values = dict(described["context"])
    if values["vocabulary"] is not None:
        lists = {name: tuple(one) for name, one in values["vocabulary"].items() if isinstance(one, list)}
        values["vocabulary"] = Vocabulary(**values["vocabulary"] | lists)
    context = Context(**values | {name: tuple(values[name]) for name in ("class_names", "losses")})
    config = find_objective(described["objective"]).Config(**described["config"])
    return build_objective(described["objective"], config, context)


def load_engine(engine: Any, found: checkpoint.Checkpoint) -> None:
    """Restore the optimizer's state and the engine's counters on all ranks, the model having its weights already.

    AdamW's settings stay those of this run.

    Raises:
        RunError: what this run's ranks now hold differs from what was saved.
    """
    load_optimizer(engine, SavedState(found.folder), found.manifest["adam_steps"])
    load_extra_state(engine.module, found.folder)
    engine.global_steps, engine.global_samples = found.step, found.step * engine.train_batch_size()
    if (held := engine_digests(engine)) != found.manifest["digests"]:
        raise RunError(
            f"{found.folder}: restored state {held} does not match the checkpoint's digests"
            f" {found.manifest['digests']}; did the optimizer precision in the DeepSpeed JSON change?"
        )


def find(path: Path, warn: Callable[[str], None]) -> checkpoint.Checkpoint:
    """Returns the checkpoint in a folder, or the newest intact one of a run's folder.

    Raises:
        RunError: there is none, or it is damaged.
    """
    named = (path / checkpoint.MANIFEST).is_file()
    found = checkpoint.verify(path) if named else checkpoint.newest(path, warn)
    if found is None:
        raise RunError(f"{path} does not hold a checkpoint; name a run's folder or one of its checkpoint-STEP folders")
    return found


def restore(path: Path, warn: Callable[[str], None]) -> tuple[Objective, Tokenizer | None, checkpoint.Checkpoint]:
    """Returns the model and tokenizer of a checkpoint folder, or of the newest intact one of a run's folder.

    Weights are fp32, on the GPU if there is one; the model is in eval mode.

    Raises:
        RunError: the checkpoint is missing or damaged.
    """
    found = find(path, warn)
    model = model_of(found.manifest)
    load_weights(model, SavedState(found.folder))
    load_extra_state(model, found.folder)
    tokenizer = found.folder / "tokenizer.json"
    return model.to(hardware.device()).eval(), Tokenizer.load(tokenizer) if tokenizer.is_file() else None, found
