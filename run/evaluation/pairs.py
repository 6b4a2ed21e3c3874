"""Image-text pairs to look at: central squares, and all captions of each."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mug.data.captions import captions
from mug.data.config import DataConfig
from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.data.errors import BadSample, DataError
from mug.data.openmoji import ensure_openmoji
from mug.data.reader import Reader
from mug.data.remote import shown


class Pair(NamedTuple):
    """image: uint8 [3, S, S]. captions: those in the wanted languages, none where there are none."""

    key: str
    image: np.ndarray
    captions: list[str]


def held_out_openmoji(config: DataConfig) -> str:
    """The shards of the embedded default's held-out pairs."""
    return f"{ensure_openmoji(config.cache_folder())}/held_out-*.tar"


def read_pairs(patterns: str, config: DataConfig, size: int, limit: int) -> Iterator[Pair]:
    """At most `limit` pairs, spread evenly over the shards.

    Raises:
        DataError: a shard cannot be read, or a pair cannot be used; it is named.
    """
    reader = Reader.open(patterns, config)
    for shard, row in reader.spread(limit):
        key = reader.index.key(shard, row)
        try:
            data, text, meta = reader.read(shard, row)
            pair = Pair(key, decode_crop(data, size, CentralSquare()), captions(text, meta, config.languages()))
        except BadSample as error:
            raise DataError(f"shard '{shown(reader.index.urls[shard])}', key '{key}': {error}") from error
        yield pair
