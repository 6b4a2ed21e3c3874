"""Reads weights of other libraries: files of timm, MAE, DDP and transformers, and folders of `save_pretrained`."""

import argparse
import json
import math
import pathlib
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mug.model.encoder import PIXEL_MEAN, PIXEL_STD
from mug.model.interchange import State
from mug.model.objectives.mug import MUGConfig
from mug.model.presets import TunedEncoderConfig, resolve
from mug.model.vit import NORM_EPS
from mug.run.common.errors import RunError

CONFIG = "config.json"
FILES = ("model.safetensors", "pytorch_model.bin")  # of a folder; NAME.index.json where it is cut into several
# Where a training checkpoint keeps the weights: MAE's and DeiT's, timm's, DeepSpeed's, and what others write.
WRAPPERS = ("model", "state_dict", "module", "model_state_dict")
AVERAGED = ("state_dict_ema", "model_ema")  # timm's and DeiT's, where there are two
# What MAE and timm save alongside the weights: settings, which are plain data. No code of a pickle is ever run.
SETTINGS = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]
CLASS_TOKENS = ("cls_token", "embeddings.cls_token")  # timm's and transformers' names: what stands before is a wrapper
# transformers' config.json → ours; then timm's model_args → ours.
SIZES = {"patch_size": "patch_size", "hidden_size": "width", "num_hidden_layers": "depth"}
SIZES |= {"num_attention_heads": "heads", "embed_dim": "width", "depth": "depth", "num_heads": "heads"}
STATED = SIZES | {"image_size": "image_size", "img_size": "image_size"}  # positions are interpolated to another one


def read_file(path: Path, warn: Callable[[str], None]) -> State:
    """Returns the encoder's weights, fp32, of a safetensors or torch file, without wrappers and prefixes.

    Raises:
        RunError: the file cannot be read, or holds several encoders.
    """
    return _of_the_encoder(read_state(path, warn), path)


def read_state(path: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """Returns what a safetensors or torch file holds, without what a training script has wrapped it in.

    Raises:
        RunError: the file cannot be read.
    """
    state = _read(path)
    while inner := next((name for name in WRAPPERS if isinstance(state.get(name), dict)), None):
        if other := next((name for name in AVERAGED if name in state), None):
            warn(f"init {path} holds two sets of weights; taking {inner}, not {other}")
        state = state[inner]
    return state


def _read(path: Path) -> dict[str, Any]:
    """Returns all that a file holds.

    Raises:
        RunError: it cannot be read, or not without running code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(SETTINGS):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message suggests loading it unsafely
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"contains a {found[1]}" if found else "is damaged or contains non-tensor objects"
        raise RunError(f"init {path}: cannot load: file {what}; save a plain state dict") from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        why = (str(error) or "it is empty").splitlines()[0]
        raise RunError(f"init {path}: cannot load: {why}") from None
    if not isinstance(loaded, dict):
        raise RunError(f"init {path}: cannot load: it holds a {type(loaded).__name__}, not a state dict")
    return loaded


def _of_the_encoder(values: dict[str, Any], path: Path) -> State:
    """The tensors, fp32, that stand below the class token's prefix, such as DDP's `module.`, without it; all if there
    is none."""
    state = {name: value.float() for name, value in values.items() if isinstance(value, Tensor)}
    found = {name.removesuffix(token) for token in CLASS_TOKENS for name in state if name.endswith(token)}
    prefixes = {prefix for prefix in found if prefix.endswith(".") and not prefix.endswith("embeddings.")}
    if "" in found or "embeddings." in found or not prefixes:
        return state
    if len(prefixes) > 1:
        raise RunError(f"init {path} holds several encoders, {', '.join(sorted(prefixes))}; save one of them")
    (prefix,) = prefixes
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


# --- Folders ------------------------------------------------------------------------------------------------


def is_pretrained(folder: Path) -> bool:
    """Whether transformers' or timm's `save_pretrained` may have written the folder."""
    return (folder / CONFIG).is_file()


def read_folder(folder: Path, config: MUGConfig, norm_eps: float, warn: Callable[[str], None]) -> State:
    """Returns the encoder's weights of a folder of `save_pretrained`, as `read_file` does.

    Raises:
        RunError: no weights there, or of a model that computes something else than one of `config` and `norm_eps`.
    """
    _check_config(folder, config, norm_eps, warn)
    return _folder_state(folder, warn)


def read_language_model(folder: Path, warn: Callable[[str], None]) -> tuple[State, dict[str, Any]]:
    """Returns the weights, fp32, and the config.json of a language model, from a folder of `save_pretrained`.

    Raises:
        RunError: they are not there, or cannot be read.
    """
    if not is_pretrained(folder):
        raise RunError(f"init.language_model {folder} has no {CONFIG}: give a folder that save_pretrained has written")
    return _folder_state(folder, warn), _read_json(folder / CONFIG)


def _folder_state(folder: Path, warn: Callable[[str], None]) -> State:
    """Returns the weights of a folder of `save_pretrained`, as `read_file` does."""
    for name in FILES:
        if (folder / name).is_file():
            return read_file(folder / name, warn)
        if (index := folder / f"{name}.index.json").is_file():
            parts = sorted(set(_read_json(index).get("weight_map", {}).values()))
            if any(Path(part).name != part for part in parts):
                raise RunError(f"init {index} names files outside its folder")
            return _of_the_encoder({k: v for part in parts for k, v in _read(folder / part).items()}, folder)
    raise RunError(f"init {folder} has a {CONFIG}, but none of {', '.join(FILES)}")


def described_encoder(folder: Path) -> TunedEncoderConfig:
    """Returns the sizes that the config.json of a folder of `save_pretrained` states.

    Raises:
        RunError: it cannot be read, or does not state all of them.
        ModelConfigError: they do not fit together.
    """
    settings = _settings(folder)
    sizes = {ours: settings[theirs] for theirs, ours in STATED.items() if theirs in settings}
    if missing := sorted({*STATED.values()} - sizes.keys()):
        raise RunError(
            f"{folder / CONFIG} does not state the encoder's {', '.join(missing)}; load the run, or export it"
        )
    if isinstance(side := sizes["image_size"], list):  # timm's, of a height and a width
        sizes["image_size"] = max(side)
    return resolve(TunedEncoderConfig(**sizes, norm_eps=settings.get("layer_norm_eps", NORM_EPS)))


def _settings(folder: Path) -> dict[str, Any]:
    settings = _read_json(folder / CONFIG)
    return settings | (settings.get("model_args") or {})  # timm's


def _check_config(folder: Path, config: MUGConfig, norm_eps: float, warn: Callable[[str], None]) -> None:
    settings = _settings(folder)
    for theirs, ours in SIZES.items():
        if theirs in settings and settings[theirs] != (mine := getattr(config, ours)):
            raise RunError(
                f"init {folder} has another size: {theirs} is {settings[theirs]} there, {mine} here; set model.{ours}"
            )
    eps = settings.get("layer_norm_eps", norm_eps)
    if not math.isclose(eps, norm_eps, rel_tol=1e-6):
        raise RunError(f"init {folder}: layer_norm_eps is {eps} there, {norm_eps} here; set model.norm_eps to {eps}")
    if (activation := settings.get("hidden_act", "gelu")) != "gelu":
        raise RunError(f"init {folder}: hidden_act is {activation}, but this model uses gelu: not a plain ViT")
    prepared = settings.get("pretrained_cfg") or {}
    if (processor := folder / "preprocessor_config.json").is_file():
        prepared = _read_json(processor)
    for names, ours in ((("image_mean", "mean"), PIXEL_MEAN), (("image_std", "std"), PIXEL_STD)):
        theirs = next((prepared[name] for name in names if name in prepared), ours)
        if list(theirs) != list(ours):
            warn(f"init {folder} was trained with {names[0]} {list(theirs)}; here images get {list(ours)}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"init {path} cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise RunError(f"init {path} is not a JSON object")
    return values
