"""Image-text pairs: shards read into a list, and a list written into shards."""

import itertools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mug.api.images import ImageLike, image_bytes, name_of
from mug.data.builders.embedded import ensure_embedded
from mug.data.builders.raw_pairs import prepare
from mug.data.builders.tokenizer_training import train_tokenizer
from mug.data.builders.writers import Sample, is_held_out, replacing, write_shards
from mug.data.captions import clean
from mug.data.config import DataConfig
from mug.data.errors import BadSample, DataError
from mug.run.evaluators.held_out_pairs import PairReader
from mug.run.reporting.grid import to_image

VOCABULARY = 30_522  # max tokens, as of run/train_tokenizer.py
PER_SHARD = 10_000  # pairs, as of run/build_shards.py

log = logging.getLogger("mug")


def read_pairs(shards: str | None = None, limit: int = 24, size: int = 64) -> list[tuple[Image.Image, str]]:
    """Returns (central square, caption) of at most `limit` pairs, spread evenly over the shards.

    Those that cannot be used are left out, each with a warning; a pair without a caption has "".

    Args:
        shards: tar, Arrow or Parquet, written like data.shards; without it, the held-out pairs of the embedded default.
        size: the side of the squares, in pixels.

    Raises:
        DataError: a shard cannot be read.
    """
    shards = shards or f"{ensure_embedded(DataConfig(embedded='compositions'))}/held_out-*.tar"
    reader = PairReader.open(DataConfig(shards=shards), limit)
    pairs = [
        (to_image(torch.from_numpy(pair.image)), next(iter(pair.captions), ""))
        for pair in reader.read(range(len(reader)), size)
    ]
    for reason in reader.left_out:
        log.warning("%s; left out", reason)
    return pairs


def write_pairs(pairs: Iterable[tuple[ImageLike, str]], folder: Path, held_out: float) -> dict[str, str]:
    """Write shards that hold the pairs, and a tokenizer of their captions; returns the options of a run on them.

    The same pairs give the same bytes. Shards of other pairs in the folder are replaced.

    Raises:
        DataError: a pair is not an image and a text, or its image cannot be used, and is named; no pair is left to
            train on; or the captions hold no word.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[tuple[int, ImageLike, str]]] = {"train": [], "held_out": []}
    for number, (image, caption) in enumerate(map(_checked, itertools.count(), pairs)):
        split = "held_out" if is_held_out(_key(number), held_out) else "train"
        splits[split].append((number, image, clean(caption)))
    if not splits["train"]:
        raise DataError(f"of {len(splits['held_out'])} pairs none is left to train on: give more, or held_out 0")
    tokenizer = train_tokenizer((caption for _, _, caption in splits["train"]), VOCABULARY)
    with replacing(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str().encode())
    written = set()
    for split, some in splits.items():
        samples = (_sample(*pair) for pair in some)
        written |= {path for path, _ in write_shards(samples, folder, f"{split}-", "tar", PER_SHARD)}
    for stale in {*folder.glob("*.tar")} - written:
        stale.unlink()
    options = {"data.shards": f"{folder}/train-*.tar", "data.tokenizer": f"{folder}/tokenizer.json"}
    return options | ({"data.held_out": f"{folder}/held_out-*.tar"} if splits["held_out"] else {})


def _checked(number: int, pair: Any) -> tuple[ImageLike, str]:
    """Returns the pair.

    Raises:
        DataError: it is not an image and a text.
    """
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], str)):
        parts = ", ".join(type(part).__name__ for part in pair) if isinstance(pair, tuple | list) else ""
        raise DataError(
            f"pair {number} is a {type(pair).__name__}{f' of {parts}' if parts else ''}: give (image, caption), and"
            ' "" for no caption'
        )
    return pair[0], pair[1]


def _sample(number: int, image: ImageLike, caption: str) -> Sample:
    try:
        return prepare(Sample(_key(number), image_bytes(image), "", caption, {}), None)
    except BadSample as error:
        raise DataError(f"pair {number}, {name_of(image, number)}: {error}") from error


def _key(number: int) -> str:
    return f"{number:09d}"
