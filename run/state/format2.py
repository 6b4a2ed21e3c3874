"""Convert checkpoints of format 2, which described a model by its parts and not by its objective, to format 3."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mug.run.common.errors import RunError
from mug.run.state import checkpoint
from mug.run.state.checkpoint import Checkpoint
from mug.run.state.sharded_state import KINDS, ParamSlice, hexadecimal, write_pieces

FORMAT = 2
ENCODER = ("preset", "image_size", "patch_size", "width", "depth", "heads")
LOGS = {"metrics.jsonl": "metrics.jsonl", "ledger.jsonl": "bad_samples.jsonl"}  # of a run: the old name, the new name


def convert(found: Checkpoint, output: Path) -> Path:
    """Convert a checkpoint of format 2 to OUTPUT/checkpoint-STEP; returns that folder.

    Unchanged files are linked, or copied to another file system. The logs of the run are copied, too.

    Raises:
        RunError: it is of a segmentation run, whose files differed.
    """
    manifest = found.manifest
    model = _model(found)
    recipe = {**manifest["recipe"], "model": model["config"]}
    data = dict(manifest["data"])
    if "ledger" in data:
        data["bad_samples"] = data.pop("ledger")
    if "central_share" in recipe["data"]:
        recipe["data"] = {**recipe["data"], "crop_pct": recipe["data"]["central_share"]}
    partial = checkpoint.open_partial(output, found.step)
    moved = model["objective"] == "classify" and model["config"]["pool"] == "mean"
    files, digests = _with_encoder_norm(found, partial) if moved else (_linked(found, partial), manifest["digests"])
    own = {name: value for name, value in manifest.items() if name not in ("format", "step", "files")}
    state = own | {"model": model, "recipe": recipe, "data": data, "digests": digests}
    checkpoint.commit(output, found.step, files, state, {}, keep=1)
    for then, now in LOGS.items():
        if (found.folder.parent / then).is_file():
            shutil.copyfile(found.folder.parent / then, output / now)
    return output / f"checkpoint-{found.step}"


def _model(found: Checkpoint) -> dict[str, Any]:
    """Returns format 3's description of the model."""
    then, recipe = found.manifest["model"], found.manifest["recipe"]
    if "objective" in then:
        losses = [name for name, weight in recipe["loss_weights"].items() if weight]
        context = {"seed": then["objective"]["seed"], "vocabulary": then["vocabulary"], "class_names": []}
        return {
            "objective": then["objective"]["name"],
            "config": then["config"],
            "context": context | {"losses": losses},
        }
    if "classifier" in then:
        head = then["classifier"]
        config = {name: then["config"][name] for name in ENCODER}
        config |= {"drop_path": recipe["model"]["drop_path"], "norm_eps": head["norm_eps"], "pool": head["pool"]}
        context = {"seed": recipe["seed"], "vocabulary": None, "class_names": head["names"], "losses": ["class"]}
        return {"objective": "classify", "config": config, "context": context}
    raise RunError(f"{found.folder} is not a checkpoint of pretrain.py or finetune.py: it cannot be converted")


def _linked(found: Checkpoint, partial: Path) -> dict[str, Any]:
    for name in found.manifest["files"]:
        _link(found.folder / name, partial / name)
    return found.manifest["files"]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
        checkpoint.checksum(target)  # fsync


def _with_encoder_norm(found: Checkpoint, partial: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Write the files of a classifier whose norm behind the pooling is now the encoder's; their checksums, and the
    digest of each kind."""
    files, digests = {}, dict.fromkeys(KINDS, 0)
    for name in found.manifest["files"]:
        kind = name.partition("-")[0]
        sha256, digest = write_pieces(partial / name, dict(_renamed(found.folder / name)))
        files[name] = sha256
        digests[kind] += digest
    return files, {kind: hexadecimal(digest) for kind, digest in digests.items()}


def _renamed(path: Path) -> Iterator[tuple[ParamSlice, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            name, _, start = key.rpartition("@")
            name = f"encoder.{name}" if name.startswith("norm.") else name
            yield ParamSlice(name, int(start)), file.get_tensor(key)
