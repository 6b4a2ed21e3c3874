#!/usr/bin/env python3
"""Export an encoder to the formats that people use.

    python run/export.py runs/compositions_tiny --format timm transformers vitmae onnx --out exported

A folder per format under --out, each with a model card. From any checkpoint, ZeRO-3 shards of any world size
included, without a GPU. Each copy is read back by its own library and must agree with our encoder; and so must what
the model card's code makes of a photo that is rotated by its EXIF tag and transparent in parts.

    timm          safetensors and config.json: timm.create_model("local-dir:FOLDER", pretrained=True)
    transformers  ViTModel.from_pretrained(FOLDER)
    vitmae        ViTMAEForPreTraining.from_pretrained(FOLDER), with the pixel decoder, of objectives that have one
    onnx          model.onnx, for ONNX Runtime
"""

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from PIL import ExifTags, Image
from torch import Tensor, nn

from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.model.objectives.objective import Objective, name_of
from mug.run.common.command_line import Parser
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RunError
from mug.run.common.output import check_writable
from mug.run.common.packages import load_package
from mug.run.exporting.card import model_card
from mug.run.exporting.formats import EXTRA, FORMATS, Format
from mug.run.state.checkpoint import Checkpoint
from mug.run.state.restore import restore

TOLERANCE = 1e-4  # of the largest value, in fp32; of 1 if that is more


def main(console: Console) -> None:
    options = parse()
    out = Path(options.out)
    formats = list(dict.fromkeys(options.format))
    for name in formats:
        check_target(out / name)
        for package in FORMATS[name].packages:
            load_package(package, EXTRA)
    console.info(f"reading {options.checkpoint}")
    model, _, found = restore(Path(options.checkpoint), console.warn)
    model = model.cpu().float()
    for name in formats:
        difference = export(name, FORMATS[name], model, found, out / name)
        console.info(f"{out / name}: read back, largest difference from our encoder {difference:.1e}")


def parse(arguments: list[str] | None = None) -> Namespace:
    """Parse the command line.

    Raises:
        RunError: an unknown flag or format.
    """
    parser = Parser(prog="export.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=str, help="folder of a run, or one of its checkpoint-STEP folders")
    parser.add_argument("--format", type=str, nargs="+", default=["timm"], help=", ".join(FORMATS))
    parser.add_argument("--out", type=str, default="exported", help="folder to put a folder per format into")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.format if name not in FORMATS]
    if unknown:
        raise RunError(f"--format {unknown[0]} is not one of {', '.join(FORMATS)}")
    return options


def check_target(folder: Path) -> None:
    """Raise RunError if an export would overwrite something."""
    if folder.exists():
        raise RunError(f"{folder} exists; remove it, or choose another --out")
    check_writable(folder.parent, "--out")


@torch.inference_mode()
def export(name: str, form: Format, model: Objective, found: Checkpoint, folder: Path) -> float:
    """Write one format and read it back; the folder gets its name when both succeed.

    Returns:
        The largest absolute difference between what the copy and our model make of random images and of a photo.

    Raises:
        RunError: the model's output is not finite, or its encoder incomplete.
        RuntimeError: the copy, or the model card's code, gives another output.
    """
    if not isinstance(model.encoder.norm, nn.LayerNorm):
        raise RunError(
            f"{found.folder} does not hold a complete encoder: objective {name_of(type(model))} has no final norm"
        )
    side = model.config.image_size
    image_BCHW = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(0))
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        form.write(model, partial)
        theirs, ours = form.read_back(partial, model, image_BCHW)
        if not ours.isfinite().all():
            raise RunError(f"{found.folder}: the model's output is not finite; export an earlier checkpoint")
        difference = agree(f"{name}: the copy", theirs, ours)
        card = model_card(found.folder.resolve().parent.name, form, model, found)
        (partial / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        with tempfile.TemporaryDirectory() as place:
            photo = write_photo(Path(place) / "photo.png", side)
            names = run_usage(form.usage(model.config), partial, photo)
            view_1CHW = torch.from_numpy(decode_crop(photo.read_bytes(), side, CentralSquare()))[None]
        difference = max(difference, agree(f"{name}: the card's code", *form.shown(names, model, view_1CHW)))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference


def agree(who: str, theirs: Tensor, ours: Tensor) -> float:
    """Returns the largest absolute difference.

    Raises:
        RuntimeError: it exceeds rounding.
    """
    difference = (theirs - ours).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, ours.abs().max().item()):
        raise RuntimeError(f"{who} differs from our model by {difference}")
    return difference


# --- The model card's code -----------------------------------------------------------------------------------


def write_photo(path: Path, side: int) -> Path:
    """Returns a PNG of `side` x `side` px, so that nothing is resized, which shows whether its EXIF orientation (a
    quarter turn) and its transparency are respected."""
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(9 * x + 5 * y), np.cos(7 * x), np.sin(8 * y), 2 * np.cos(6 * x * y)]
    pixels_HW4 = (127.5 + 127 * np.stack(waves, 2).clip(-1, 1)).astype(np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels_HW4, "RGBA").save(path, exif=exif)
    return path


def run_usage(code: str, folder: Path, photo: Path) -> dict[str, Any]:
    """Returns the variables of the model card's code, run inside the exported folder as the card instructs."""
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        exec(code.replace('"photo.png"', repr(str(photo))), names)
    return names


if __name__ == "__main__":
    run_command(main)
