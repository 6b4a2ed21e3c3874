"""Image-text pairs to evaluate on: central squares, and all captions of each."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mug.data.builders.embedded import sources_of
from mug.data.captions import captions
from mug.data.config import DataConfig
from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.data.errors import BadSample
from mug.data.languages import check_languages
from mug.data.reader import Reader
from mug.data.store.expand import without_signatures
from mug.data.store.remote import redact_url
from mug.run.cluster import hardware
from mug.run.common.command_line import check_min
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import EvalConfig, EvalContext
from mug.run.evaluators.sharing import share

log = logging.getLogger("mug")


@dataclass(frozen=True)
class PairsConfig(EvalConfig):
    """Image-text pairs to evaluate on.

    Args:
        shards: pairs, written like data.shards; without it, the run's held-out ones.
        limit: max pairs, spread evenly over the shards.
    """

    shards: str | None = None
    limit: int = 5000

    def check(self) -> None:
        super().check()
        check_min(self, {"limit": 1})


class Pair(NamedTuple):
    """number: of the pair among those that are read. image: uint8 [3, S, S]. captions: those in the wanted languages,
    empty where it has none. meta: its json, empty where it has none."""

    number: int
    key: str
    image: np.ndarray
    captions: list[str]
    meta: bytes


@dataclass(frozen=True)
class PairReader:
    """At most `limit` pairs, spread evenly over the shards; those that cannot be used are left out.

    data: `shards` are those to read. left_out: why this process could not use a pair.

    Raises:
        DataError: a shard cannot be read, or no pair has a caption in a wanted language.
    """

    data: DataConfig
    limit: int
    left_out: list[str] = field(default_factory=list)
    reader: Reader = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "reader", Reader.open(self.data.shards, self.data))
        check_languages(self.reader, self.data.languages())

    def __len__(self) -> int:
        return min(self.limit, len(self.reader.index))

    def read(self, numbers: Sequence[int], size: int) -> Iterator[Pair]:
        """Yields the pairs of these numbers, 0..len - 1, `size` pixels a side, without those that cannot be used."""
        places = list(self.reader.spread(self.limit))
        for number in numbers:
            shard, row = places[number]
            key = self.reader.index.key(shard, row)
            try:
                data, text, meta = self.reader.read(shard, row)
                image = decode_crop(data, size, CentralSquare())
                yield Pair(number, key, image, captions(text, meta, self.data.languages()), meta)
            except BadSample as error:
                self.left_out.append(f"shard '{redact_url(self.reader.index.urls[shard])}', key '{key}': {error}")

    def captioned_share(self, size: int, batch: int) -> Iterator[list[Pair]]:
        """Yields this rank's pairs that have a caption, in batches."""
        pairs = (pair for pair in self.read(share(len(self)), size) if pair.captions)
        while found := list(itertools.islice(pairs, batch)):
            yield found

    def report(self) -> None:
        """Warn of the pairs that all ranks have left out; a collective call."""
        left_out = hardware.gather(self.left_out)
        self.left_out.clear()
        if left_out:
            log.warning(
                "%d of %d pairs cannot be used and were left out; the first: %s", len(left_out), len(self), left_out[0]
            )


def held_out_shards(data: DataConfig) -> str | None:
    """Returns the shards that a run with this data holds out; None where it holds out none."""
    return sources_of(data).held_out


def open_pairs(config: PairsConfig, context: EvalContext) -> PairReader:
    """Returns the pairs that the options name.

    Raises:
        RunError: the run has no held-out pairs, and the options name no others.
        DataError: see `PairReader`.
    """
    data = context.pairs or DataConfig(cache=context.cache)
    shards = config.shards or (context.pairs and held_out_shards(data))
    if not shards:
        raise RunError(f"{context.output} was trained without data.held_out; give pairs by the option `shards`")
    return PairReader(replace(data, shards=shards), config.limit)


def name_of_pairs(config: PairsConfig) -> str:
    """Returns the name of the pairs in a record of results."""
    return without_signatures(config.shards or "held-out pairs")


def images_of(pairs: Sequence[Pair]) -> Tensor:
    """Returns the images, uint8 [B, 3, S, S], on this rank's device."""
    return torch.from_numpy(np.stack([pair.image for pair in pairs])).to(hardware.device())
