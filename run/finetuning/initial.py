"""The weights that fine-tuning begins with."""

import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mug.model.encoder import Encoder
from mug.model.interchange import State, load_encoder
from mug.model.presets import ModelConfig, ModelConfigError
from mug.model.vit import init_weights
from mug.run.training.errors import RunError
from mug.run.training.restore import find
from mug.run.training.sharded_state import SavedState, load_weights

SIZES = ("patch_size", "width", "depth", "heads")  # positions are computed, so the image's size may differ


def initial_encoder(config: ModelConfig, init: str | None, seed: int, warn: Callable[[str], None]) -> Encoder:
    """An encoder with the weights of `init` (see FinetuneRecipe), or freshly drawn.

    Raises:
        RunError: nothing there, or weights of another size.
    """
    torch.manual_seed(seed)
    encoder = Encoder(config).apply(init_weights)
    if init is None:
        return encoder
    path = Path(init)
    if path.is_file():
        try:
            load_encoder(encoder, _read_state(path))
        except ModelConfigError as error:
            raise RunError(f"init {path}: {error}") from None
    elif path.is_dir():
        _load_checkpoint(encoder, config, path, warn)
    else:
        raise RunError(f"init {path}: no such file or folder; name a run, a checkpoint or a file of weights")
    return encoder


def _read_state(path: Path) -> State:
    """A state dict, from safetensors or from what torch saved (MAE's under the key `model`); fp32."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("model", state)
        return {name: value.float() for name, value in state.items()}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, AttributeError, EOFError) as error:
        raise RunError(f"init {path}: no weights that can be read ({str(error).splitlines()[0]})") from None


def _load_checkpoint(encoder: Encoder, config: ModelConfig, path: Path, warn: Callable[[str], None]) -> None:
    found = find(path, warn)
    if (theirs := found.manifest["model"].get("config")) is None:
        raise RunError(f"init {found.folder} holds no encoder of its own; name a run of pretrain.py or finetune.py")
    for name in SIZES:
        if theirs[name] != (ours := getattr(config, name)):
            raise RunError(
                f"init {found.folder} is of another size: {name} is {theirs[name]} there, {ours} here; set model.{name}"
            )
    load_weights(encoder, SavedState(found.folder), "encoder.")
