#!/usr/bin/env python3
"""Hand over an encoder in the formats that people use.

    python run/export.py runs/openmoji_tiny --format timm transformers vitmae onnx --out exported

A folder per format under --out, each with a model card. From any checkpoint, ZeRO-3 shards of any world size
included, without a GPU. Each copy is read back by its own library and must agree with our encoder.

    timm          safetensors and config.json: timm.create_model("local-dir:FOLDER", pretrained=True)
    transformers  ViTModel.from_pretrained(FOLDER)
    vitmae        ViTMAEForPreTraining.from_pretrained(FOLDER), with the pixel decoder
    onnx          model.onnx, for ONNX Runtime
"""

import shutil
from pathlib import Path

import torch
from jsonargparse import Namespace

from mug.model.mug import MUG
from mug.run.exporting.card import model_card
from mug.run.exporting.formats import EXTRA, FORMATS, Format
from mug.run.training.checkpoint import Checkpoint
from mug.run.training.command_line import Parser
from mug.run.training.console import Console, run_command
from mug.run.training.errors import RunError
from mug.run.training.output import check_writable
from mug.run.training.packages import load_package
from mug.run.training.restore import restore

TOLERANCE = 1e-4  # of the largest value, in fp32; of 1 if that is more


def main(console: Console) -> None:
    options = parse()
    out = Path(options.out)
    formats = list(dict.fromkeys(options.format))
    for name in formats:
        check_target(out / name)
        for package in FORMATS[name].packages:
            load_package(package, EXTRA)
    console.say(f"reading {options.checkpoint}")
    model, _, found = restore(Path(options.checkpoint), console.warn)
    model = model.cpu().float()
    for name in formats:
        difference = export(name, FORMATS[name], model, found, out / name)
        console.say(f"{out / name}: read back, largest difference from our encoder {difference:.1e}")


def parse(arguments: list[str] | None = None) -> Namespace:
    """The command line.

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
        raise RunError(f"{folder} is there already; remove it, or name another --out")
    check_writable(folder.parent, "--out")


@torch.inference_mode()
def export(name: str, form: Format, model: MUG, found: Checkpoint, folder: Path) -> float:
    """Write one format and read it back; the folder takes its name when that went well.

    Returns:
        The largest absolute difference between what the copy and our model make of random images.

    Raises:
        RunError: the model's output is not finite.
        RuntimeError: the copy gives another output.
    """
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
        difference = (theirs - ours).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, ours.abs().max().item()):
            raise RuntimeError(f"{name}: the copy differs from our model by {difference}")
        card = model_card(found.folder.resolve().parent.name, form, model.config, found)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference


if __name__ == "__main__":
    run_command(main)
