"""The pairs of other shards with their captions permuted: a control that shows what right captions teach."""

import json
from collections.abc import Callable, Iterator

import numpy as np

from mug.data.builders.own_keys import OwnKeys
from mug.data.builders.writers import Sample
from mug.data.captions import clean
from mug.data.config import DataConfig
from mug.data.reader import Reader

OF_CAPTION = ("caption", "captions")  # keys of the json that move with the caption


def shuffled_pairs(patterns: str, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the samples of shards whose key is wanted, those with a caption having that of another such sample.

    A fixed permutation of a single cycle: no sample keeps its own caption, unless it is the only one. A key that comes
    twice, as from two sets, gets a number.

    Raises:
        DataError: the shards are missing or damaged.
    """
    reader = Reader.open(patterns, DataConfig())
    places = [*reader.spread(len(reader.index))]
    captions = [clean(reader.read_texts(*place)[0]) for place in places]
    captioned = np.flatnonzero([bool(caption) for caption in captions])
    cycle = np.random.default_rng(0).permutation(captioned)
    giver = {int(taker): int(one) for taker, one in zip(cycle, np.roll(cycle, 1), strict=True)}
    keys = OwnKeys()
    for number, place in enumerate(places):
        key = reader.index.key(*place)
        own_key = keys.own(key, reader.index.name(*place))
        if wanted(key):
            image, _, own = reader.read(*place)
            other = giver.get(number, number)
            theirs = _object(reader.read_json(*places[other]))
            meta = {name: value for name, value in _object(own).items() if name not in OF_CAPTION}
            meta |= {name: theirs[name] for name in OF_CAPTION if name in theirs}
            yield Sample(own_key, image, "", captions[other], meta)


def _object(text: bytes) -> dict:
    return json.loads(text) if text else {}
