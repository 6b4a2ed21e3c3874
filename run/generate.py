#!/usr/bin/env python3
"""Show a checkpoint's reconstructions and captions, as a PNG and a self-contained HTML page.

python run/generate.py runs/compositions_tiny                      # held-out pairs
python run/generate.py runs/compositions_tiny photo.jpg shard.tar --beams 4 --out seen
python run/generate.py runs/unix2 --languages en,de,ja --limit 2   # captions in languages, as languages.svg
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse import Namespace

from mug.data.builders.image_files import is_image
from mug.data.captions import by_language
from mug.data.config import DataConfig
from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.data.errors import DataError
from mug.model.objectives.objective import CaptionsInLanguages, Objective, Reconstructs, name_of
from mug.run.cluster import hardware
from mug.run.common.command_line import Parser, check_min
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RunError
from mug.run.common.output import check_writable, write_png, write_whole
from mug.run.evaluators.held_out_pairs import PairReader, held_out_shards
from mug.run.evaluators.pictures import check_pictured, draw_rows, writes_captions
from mug.run.reporting.grid import Picture, draw_grid, to_image
from mug.run.reporting.hero import draw_hero, marked
from mug.run.reporting.languages import Captioned, draw_languages
from mug.run.reporting.page import data_url, render
from mug.run.reporting.records import correct_line, held_out_metrics
from mug.run.state.checkpoint import Checkpoint
from mug.run.state.restore import restore
from mug.run.training.recipe import Recipe

HERO_ROWS = 4

log = logging.getLogger("mug")


class Shown(NamedTuple):
    """image: uint8 [3, S, S]. caption: "" where there is none. meta: its json, empty where there is none."""

    image: np.ndarray
    caption: str
    meta: bytes


def main(console: Console) -> None:
    options = parse()
    out = Path(options.out)
    check_writable(out, "--out")
    console.info(f"reading {options.checkpoint}")
    objective, tokenizer, found = restore(Path(options.checkpoint), console.warn)
    if options.languages:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "languages.svg", in_languages(options, objective, tokenizer, found))
        console.info(str(out / "languages.svg"))
        return
    check_pictured(objective)
    images, true = read_inputs(options, pairs_of(found), objective.config.image_size)
    image_BCHW = torch.from_numpy(np.stack(images)).to(hardware.device())
    position_B = torch.arange(len(images), device=image_BCHW.device)
    pictures = draw_rows(objective, tokenizer, image_BCHW, position_B, true, options.beams)
    out.mkdir(parents=True, exist_ok=True)
    draw_grid(pictures, out / "generated.png")
    write_png(out / "hero.png", draw_hero([picture.row() for picture in pictures[:HERO_ROWS]]))
    facts = [f"{found.folder.parent.name}, step {found.step}"]
    if metrics := held_out_metrics(found):
        losses = {name: value for name, value in metrics.items() if not name.startswith("correct")}
        facts.append("held out: " + ", ".join(f"{name} {value:.3f}" for name, value in losses.items()))
        facts += [f"held out: {line}"] if (line := correct_line(metrics)) else []
    write_whole(out / "generated.html", page(pictures, facts, what_is_shown(objective)))
    for line in (*facts, f"{len(pictures)} images", out / "generated.png", out / "generated.html"):
        console.info(str(line))


def parse(arguments: list[str] | None = None) -> Namespace:
    """Parse the command line.

    Raises:
        RunError: an unknown flag, or a number out of range.
    """
    parser = Parser(prog="generate.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=str, help="folder of a run, or one of its checkpoint-STEP folders")
    parser.add_argument("inputs", type=str, nargs="*", help="image files and shards (the run's held-out pairs)")
    parser.add_argument("--out", type=str, default="generated", help="folder for the PNG and the page")
    parser.add_argument("--beams", type=int, default=4, help="beams, next to the greedy caption; 1 is greedy only")
    parser.add_argument("--limit", type=int, default=24, help="max images to show, spread over each shard")
    parser.add_argument("--cache", type=str | None, default=None, help="folder of the embedded default")
    parser.add_argument(
        "--languages", type=str | None, default=None, help="write captions in these, as en,de, and nothing else"
    )
    options = parser.parse_args(arguments)
    check_min(options, {"beams": 1, "limit": 1}, "--")
    return options


def pairs_of(found: Checkpoint) -> DataConfig:
    """Returns how the run of a checkpoint reads its image-text pairs; the embedded ones where it held out none."""
    streams = Recipe.from_dict(found.manifest["recipe"]).streams.values()
    configs = (stream.config for stream in streams)
    return next((one for one in configs if isinstance(one, DataConfig) and held_out_shards(one)), DataConfig())


def read_inputs(options: Namespace, data: DataConfig, size: int) -> tuple[list[np.ndarray], list[str]]:
    """Returns uint8 [3, size, size] images and their captions ("" where there is none); see `read_pairs`."""
    pairs = read_pairs(options, data, size)
    return [pair.image for pair in pairs], [pair.caption for pair in pairs]


def read_pairs(options: Namespace, data: DataConfig, size: int) -> list[Shown]:
    """Returns the inputs; without any, the pairs that `data` holds out.

    Raises:
        RunError: a file is missing.
        DataError: a file cannot be decoded; it is named.
    """
    data = replace(data, cache=options.cache or data.cache)
    pairs: list[Shown] = []
    for name in options.inputs or [held_out_shards(data)]:
        path = Path(name)
        if options.inputs and path.is_dir():
            raise RunError(f"{path} is a folder; give the images or shards in it, as {path}/*")
        if options.inputs and not path.is_file():
            raise RunError(f"{path}: no such file; give images or shards")
        if is_image(path.name):
            pairs.append(Shown(read_image(path, size), "", b""))
        else:
            reader = PairReader.open(replace(data, shards=name), options.limit)
            found = reader.read(range(len(reader)), size)
            pairs += [Shown(pair.image, next(iter(pair.captions), ""), pair.meta) for pair in found]
            for reason in reader.left_out:
                log.warning("%s; left out", reason)
    if not pairs:
        raise RunError("none of the inputs holds a usable image; choose others")
    return pairs[: options.limit]


def read_image(path: Path, size: int) -> np.ndarray:
    """Returns the central square of an image file, uint8 [3, size, size]."""
    try:
        return decode_crop(path.read_bytes(), size, CentralSquare())
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def in_languages(options: Namespace, objective: Any, tokenizer: Any, found: Checkpoint) -> str:
    """Returns an SVG of the images with captions in each of the languages, next to true ones.

    Raises:
        RunError: the objective does not write in one of them.
    """
    languages = tuple(part.strip() for part in options.languages.split(","))
    known = objective.languages() if isinstance(objective, CaptionsInLanguages) else ()
    if unknown := [one for one in languages if one not in known]:
        writes = f"it writes in {', '.join(known) or 'no language of choice'}"
        raise RunError(
            f"--languages: objective {name_of(type(objective))} does not write in {', '.join(unknown)}; {writes}"
        )
    objective.check_captions()
    data = replace(pairs_of(found), language=",".join(languages))
    shown = read_pairs(options, data, objective.config.image_size)
    image_BCHW = torch.from_numpy(np.stack([one.image for one in shown])).to(hardware.device())
    with torch.inference_mode():
        tokens = {one: objective.caption(image_BCHW, options.beams, known.index(one)) for one in languages}
    pictures = [
        Captioned(
            to_image(image_BCHW[i]),
            {one: tokenizer.decode(tokens_BT[i, 1:]) for one, tokens_BT in tokens.items()},
            by_language(b"", one.meta, languages) if one.meta else {},
        )
        for i, one in enumerate(shown)
    ]
    title = f"{found.folder.parent.name}, step {found.step}: captions in {', '.join(languages)}"
    return draw_languages(pictures, title)


def what_is_shown(objective: Objective) -> str:
    """Returns an explanation of the images and captions, and of those that the objective does not make."""
    name, parts = name_of(type(objective)), []
    if isinstance(objective, Reconstructs):
        parts.append("The encoder sees the patches that are not grey, and reconstructs the others.")
        parts.append(
            "The loss is on patches less their mean, over their standard deviation: a reconstructed patch is shown with"
            " the true patch's mean and contrast."
            if getattr(objective.config, "normalize_patches", False)
            else "Reconstructed patches are shown as predicted."
        )
    else:
        parts.append(f"Objective {name} does not reconstruct patches.")
    if writes_captions(objective):
        parts.append(
            "Captions are written from the full image: green words are in the true caption, in the same order, and"
            " underlined red ones are not. Below, where it looked for each word."
        )
    else:
        parts.append(f"Objective {name} does not write captions.")
    return " ".join(parts)


def page(pictures: list[Picture], facts: list[str], note: str) -> str:
    """Returns one HTML page that needs no other file and no network."""
    shown = [
        (
            {name: data_url(to_image(image)) for name, image in picture.images.items()},
            picture.captions,
            {
                author: marked(text, picture.captions.get("true", ""))
                for author, text in picture.captions.items()
                if author != "true"
            },
            [(word, data_url(to_image(image))) for word, image in picture.words],
        )
        for picture in pictures
    ]
    return render("generated.html", title=f"MUG: {facts[0]}", facts=facts, note=note, samples=shown)


if __name__ == "__main__":
    run_command(main)
