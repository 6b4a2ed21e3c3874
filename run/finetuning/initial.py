"""The weights that fine-tuning begins with."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mug.model.encoder import Encoder
from mug.model.interchange import State, as_mae, load_encoder
from mug.model.positions import sincos_2d, stretched
from mug.model.presets import ModelConfig, ModelConfigError
from mug.model.vit import init_weights
from mug.run.training.errors import RunError
from mug.run.training.restore import find
from mug.run.training.sharded_state import WEIGHT, Piece, SavedState, load_weights

SIZES = ("patch_size", "width", "depth", "heads")  # positions are stretched, so the image's size may differ


def initial_encoder(config: ModelConfig, init: str | None, seed: int, warn: Callable[[str], None]) -> Encoder:
    """An encoder with the weights of `init` (see FinetuneRecipe), or freshly drawn.

    Positions of images of another size are stretched to those of `config`.

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
            load_encoder(encoder, _at_grid(as_mae(_read_state(path)), config.grid))
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
    except pickle.UnpicklingError:  # torch's words advise to load it unsafely
        raise RunError(
            f"init {path}: no weights that can be read: it is damaged, or holds more than tensors; save them alone"
        ) from None
    except (SafetensorError, RuntimeError, AttributeError, EOFError) as error:
        why = (str(error) or "it is empty").splitlines()[0]
        raise RunError(f"init {path}: no weights that can be read ({why})") from None


def _load_checkpoint(encoder: Encoder, config: ModelConfig, path: Path, warn: Callable[[str], None]) -> None:
    found = find(path, warn)
    if (theirs := found.manifest["model"].get("config")) is None:
        raise RunError(f"init {found.folder} holds no encoder of its own; name a run of pretrain.py or finetune.py")
    for name in SIZES:
        if theirs[name] != (ours := getattr(config, name)):
            raise RunError(
                f"init {found.folder} is of another size: {name} is {theirs[name]} there, {ours} here; set model.{name}"
            )
    saved, classifier = SavedState(found.folder), found.manifest["model"].get("classifier")
    if classifier is None:
        load_weights(encoder, saved, "encoder.")
        positions_ND = sincos_2d(config.width, theirs["image_size"] // theirs["patch_size"])
    else:
        positions_ND = _load_classifier(encoder, saved, classifier["pool"], theirs)
    encoder.positions_ND.copy_(stretched(positions_ND, config.grid))


def _load_classifier(encoder: Encoder, saved: SavedState, pool: str, sizes: dict[str, int]) -> Tensor:
    """The encoder of a mug.model.classifier.Classifier, whose norm may stand behind the pooling; its positions [N, D],
    which were trained."""
    norm = encoder.norm
    if pool == "mean":
        load_weights(norm, saved, "norm.")
        encoder.norm = nn.Identity()
    load_weights(encoder, saved, "encoder.")
    encoder.norm = norm
    patches, width = (sizes["image_size"] // sizes["patch_size"]) ** 2, sizes["width"]
    return saved.read(WEIGHT, Piece("encoder.positions_ND", 0), patches * width).view(patches, width)


def _at_grid(state: State, grid: int) -> State:
    """A state of timm's names whose positions, if they are of a square and a class token, are those of another grid."""
    positions_1LD = state.get("pos_embed", torch.empty(0))
    patches = positions_1LD.shape[1] - 1 if positions_1LD.ndim == 3 else 0
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        return state  # to be refused by name
    patches_ND = stretched(positions_1LD[0, 1:], grid)
    return {**state, "pos_embed": torch.cat([positions_1LD[:, :1], patches_ND[None]], 1)}
