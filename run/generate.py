#!/usr/bin/env python3
"""Show what a checkpoint sees: reconstructions and captions, as a PNG and a self-contained HTML page.

python run/generate.py runs/openmoji_tiny                      # held-out pairs of the embedded default
python run/generate.py runs/openmoji_tiny photo.jpg shard.tar --beams 4 --out seen
"""

import html
from pathlib import Path

import numpy as np
import torch
from jsonargparse import Namespace

from mug.data.config import DataConfig
from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.data.errors import DataError
from mug.run.evaluation.pairs import held_out_openmoji, read_pairs
from mug.run.evaluation.records import held_out_figures
from mug.run.reporting.page import data_url, html_page
from mug.run.training.command_line import Parser
from mug.run.training.console import Console, run_command
from mug.run.training.errors import RunError
from mug.run.training.output import check_writable
from mug.run.training.pictures import COLUMNS, Sample, draw_grid
from mug.run.training.restore import restore
from mug.run.training.samples import rows

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def main(console: Console) -> None:
    options = parse()
    out = Path(options.out)
    check_writable(out, "--out")
    console.say(f"reading {options.checkpoint}")
    model, tokenizer, found = restore(Path(options.checkpoint), console.warn)
    images, true = read_inputs(options, model.config.image_size)
    image_BCHW = torch.from_numpy(np.stack(images)).to(next(model.parameters()).device)
    position_B = torch.arange(len(images), device=image_BCHW.device)
    samples = rows(model, tokenizer, image_BCHW, position_B, true, options.beams)
    out.mkdir(parents=True, exist_ok=True)
    draw_grid(samples, out / "generated.png")
    facts = [f"{found.folder.parent.name}, step {found.step}"]
    if figures := held_out_figures(found):
        facts.append("held out: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    (out / "generated.html").write_text(page(samples, facts, model.config.normalize_patches), encoding="utf-8")
    for line in (*facts, f"{len(samples)} images", out / "generated.png", out / "generated.html"):
        console.say(str(line))


def parse(arguments: list[str] | None = None) -> Namespace:
    """The command line.

    Raises:
        RunError: an unknown flag, or a number out of range.
    """
    parser = Parser(prog="generate.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=str, help="folder of a run, or one of its checkpoint-STEP folders")
    parser.add_argument("inputs", type=str, nargs="*", help="image files and shards (held-out OpenMoji pairs)")
    parser.add_argument("--out", type=str, default="generated", help="folder for the PNG and the page")
    parser.add_argument("--beams", type=int, default=4, help="beams, beside the greedy caption; 1 is greedy alone")
    parser.add_argument("--limit", type=int, default=24, help="most images to show, spread over each shard")
    parser.add_argument("--cache", type=str | None, default=None, help="folder of the embedded default")
    options = parser.parse_args(arguments)
    for name in ("beams", "limit"):
        if options[name] < 1:
            raise RunError(f"--{name} must be at least 1, not {options[name]}")
    return options


def read_inputs(options: Namespace, size: int) -> tuple[list[np.ndarray], list[str]]:
    """uint8 [3, size, size] images and their captions ("" where there is none).

    Raises:
        RunError: a file is missing.
        DataError: a file cannot be decoded; it is named.
    """
    config = DataConfig(cache=options.cache)
    pairs: list[tuple[np.ndarray, str]] = []
    for name in options.inputs or [held_out_openmoji(config)]:
        path = Path(name)
        if options.inputs and not path.is_file():
            raise RunError(f"{path}: no such file; name images or shards")
        if path.suffix.lower() in IMAGES:
            pairs.append((read_image(path, size), ""))
        else:
            found = read_pairs(name, config, size, options.limit)
            pairs += [(pair.image, next(iter(pair.captions), "")) for pair in found]
    images, true = zip(*pairs[: options.limit], strict=True)
    return list(images), list(true)


def read_image(path: Path, size: int) -> np.ndarray:
    """The central square of an image file, uint8 [3, size, size]."""
    try:
        return decode_crop(path.read_bytes(), size, CentralSquare())
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def page(samples: list[Sample], facts: list[str], normalized: bool) -> str:
    """One HTML page that needs no other file and no network."""
    source = ". ".join(facts)
    note = (
        "The loss is on patches less their mean, over their standard deviation: a painted patch is shown with the"
        " true patch's mean and contrast."
        if normalized
        else "Painted patches are shown as predicted."
    )
    articles = "".join(_article(sample) for sample in samples)
    return html_page(
        f"MUG: {facts[0]}",
        f"<h1>What MUG sees</h1><p>{html.escape(source)}. The encoder sees the patches that are not grey, and paints"
        f" the others; captions are written from the whole image. {note}</p>{articles}",
    )


def _article(sample: Sample) -> str:
    figures = "".join(
        f'<figure><img alt="{name}" src="{data_url(image)}"><figcaption>{name}</figcaption></figure>'
        for name, image in zip(COLUMNS, sample.images(), strict=True)
    )
    captions = "".join(
        f"<dt>{html.escape(author)}</dt><dd>{html.escape(text) or '(none)'}</dd>"
        for author, text in sample.captions.items()
    )
    return f"<article><div>{figures}</div><dl>{captions}</dl></article>"


if __name__ == "__main__":
    run_command(main)
