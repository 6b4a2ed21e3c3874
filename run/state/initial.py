"""The weights that a model, or parts of it, are initialized with."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mug.model.encoder import Encoder
from mug.model.interchange import State, as_mae, load_encoder
from mug.model.objectives.objective import Objective, TakesLanguageModel
from mug.model.positions import interpolate_pos_embed
from mug.model.presets import EncoderConfig, ModelConfigError
from mug.model.vit import NORM_EPS
from mug.run.common.errors import RunError
from mug.run.state.foreign_weights import is_pretrained, read_file, read_folder, read_language_model, read_state
from mug.run.state.restore import find, model_of
from mug.run.state.sharded_state import SavedState, load_weights

LANGUAGE_MODEL = "language_model"  # in `init`: of all parts that read and write text
SIZES = ("patch_size", "width", "depth", "heads")  # positions are interpolated, so the image's size may differ


def initialize(model: Objective, init: str | Mapping[str, str], warn: Callable[[str], None]) -> None:
    """Give the model's parts the weights of `init` (see Recipe): a path alone is that of the encoder.

    Raises:
        RunError: there is no such part or path, or it holds weights of another size or kind.
    """
    able: Any = model
    for part, path in parts_of(init).items():
        if part == "encoder":
            model.adopt(initial_encoder(model.config, path, warn))
        elif part == LANGUAGE_MODEL and isinstance(able, TakesLanguageModel):
            _load_language_model(able, path, warn)
        else:
            _load_part(model, part, path, warn)


def parts_of(init: str | Mapping[str, str]) -> Mapping[str, str]:
    """Returns part → path of a recipe's `init`."""
    return {"encoder": init} if isinstance(init, str) else init


def check_part(model: nn.Module, part: str, option: str) -> None:
    """Raise RunError, which begins with the option's name, unless the model has parameters under the part's."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if not any(f"{name}.".startswith(f"{part}.") for name in names):
        parts = dict.fromkeys(name.partition(".")[0] for name in names)
        raise RunError(f"{option}: the model has no part of this name; it has {', '.join(parts)}, and their submodules")


def _load_language_model(model: TakesLanguageModel, path: str, warn: Callable[[str], None]) -> None:
    state, settings = read_language_model(Path(path), warn)
    try:
        model.load_language_model(state, settings)
    except ModelConfigError as error:
        raise RunError(f"init.{LANGUAGE_MODEL} {path}: {error}") from None


@torch.no_grad()
def _load_part(model: Objective, part: str, path: str, warn: Callable[[str], None]) -> None:
    """Fill the parameters of a part from the part of the same name of a run, or from a file of its state dict."""
    option = f"init.{part}"
    check_part(model, part, option)
    mine = _parameters(model, part)
    theirs = _part_weights(Path(path), part, option, warn)
    for name, parameter in mine.items():
        if name not in theirs:
            raise RunError(f"{option} {path} does not hold {name}; name another run or file")
        if theirs[name].shape != parameter.shape:
            sizes = f"{tuple(theirs[name].shape)} there, {tuple(parameter.shape)} here"
            raise RunError(f"{option} {path} has another size: {name} is {sizes}; change the section model")
        parameter.copy_(theirs[name])
    if unknown := sorted(theirs.keys() - mine.keys()):
        raise RunError(f"{option} {path} holds {unknown[0]}, which this model does not have; change the section model")


def _parameters(model: nn.Module, part: str) -> dict[str, nn.Parameter]:
    """Returns the parameters of a part by their names, those that it shares with other parts among them."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if f"{name}.".startswith(f"{part}.")}


def _part_weights(path: Path, part: str, option: str, warn: Callable[[str], None]) -> dict[str, Tensor]:
    """Returns the parameters of a part by their names in the model."""
    if path.is_dir():
        found = find(path, warn)
        trained = model_of(found.manifest)
        load_weights(trained, SavedState(found.folder))
        return {name: parameter.detach() for name, parameter in _parameters(trained, part).items()}
    if not path.exists():
        raise RunError(f"{option} {path}: no such file or folder; name a run, a checkpoint or a file of weights")
    state = {name.removeprefix(f"{part}."): value for name, value in read_state(path, warn).items()}
    return {f"{part}.{name}": value for name, value in state.items()}


def initial_encoder(config: EncoderConfig, init: str, warn: Callable[[str], None]) -> Encoder:
    """Returns an encoder of these sizes with the weights of `init` (see Recipe).

    Positions of images of another size are interpolated to those of `config`.

    Raises:
        RunError: the path does not exist, or holds weights of another size or another kind of ViT.
    """
    norm_eps = getattr(config, "norm_eps", NORM_EPS)
    encoder, path = Encoder(config, norm_eps), Path(init)
    if path.is_dir() and not is_pretrained(path):
        _load_checkpoint(encoder, config, path, warn)
        return encoder
    if not path.exists():
        raise RunError(f"init {path}: no such file or folder; name a run, a checkpoint or a file of weights")
    state = read_folder(path, config, norm_eps, warn) if path.is_dir() else read_file(path, warn)
    try:
        load_encoder(encoder, _at_grid(as_mae(state), config.grid))
    except ModelConfigError as error:
        raise RunError(f"init {path}: {error}") from None
    return encoder


def _load_checkpoint(encoder: Encoder, config: EncoderConfig, path: Path, warn: Callable[[str], None]) -> None:
    found = find(path, warn)
    theirs = found.manifest["model"]["config"]
    for name in SIZES:
        if theirs[name] != (ours := getattr(config, name)):
            raise RunError(
                f"init {found.folder} has another size: {name} is {theirs[name]} there, {ours} here; set model.{name}"
            )
    theirs_eps, ours_eps = theirs.get("norm_eps", NORM_EPS), encoder.norm.eps
    if theirs_eps != ours_eps:
        raise RunError(f"init {found.folder}: norm_eps is {theirs_eps} there, {ours_eps} here; set model.norm_eps")
    trained = model_of(found.manifest).encoder
    if not isinstance(trained.norm, nn.LayerNorm):
        raise RunError(f"init {found.folder} does not hold a complete encoder (no final norm); name another run")
    load_weights(trained, SavedState(found.folder), "encoder.")
    state = trained.state_dict()
    positions_ND = state.pop("positions_ND", trained.positions_ND)  # a parameter, if they were trained
    encoder.load_state_dict(state)
    encoder.positions_ND.copy_(interpolate_pos_embed(positions_ND.detach(), config.grid))


def _at_grid(state: State, grid: int) -> State:
    """Returns a state of timm's names with its positions, of a class token and a square, for another grid."""
    positions_1LD = state.get("pos_embed", torch.empty(0))
    patches = positions_1LD.shape[1] - 1 if positions_1LD.ndim == 3 else 0
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        return state  # to be refused by name
    patches_ND = interpolate_pos_embed(positions_1LD[0, 1:], grid)
    return {**state, "pos_embed": torch.cat([positions_1LD[:, :1], patches_ND[None]], 1)}
