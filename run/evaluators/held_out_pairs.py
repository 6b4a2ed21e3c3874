"""Image-text pairs to evaluate on: central squares, and all captions of each."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mug.data.builders.embedded import sources_of
from mug.data.captions import by_language
from mug.data.config import DataConfig
from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.data.errors import BadSample
from mug.data.index.rows import PARTS
from mug.data.languages import check_languages
from mug.data.reader import Reader
from mug.data.store.expand import without_signatures
from mug.data.store.remote import redact_url
from mug.data.tokenizer import Tokenizer
from mug.run.cluster import hardware
from mug.run.common.command_line import check_min
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import EvalConfig, EvalContext
from mug.run.evaluators.sharing import share

NO_IMAGE = np.empty(0, np.uint8)

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
    """number: of the pair among those that are read. image: uint8 [3, S, S], or NO_IMAGE. texts: language → captions,
    of those that it has; what stands in where it has none in the wanted ones. meta: its json, empty where it has none.
    """

    number: int
    key: str
    image: np.ndarray
    texts: dict[str, list[str]]
    meta: bytes

    @property
    def captions(self) -> list[str]:
        """Returns the distinct captions in all languages."""
        return list(dict.fromkeys(itertools.chain.from_iterable(self.texts.values())))


@dataclass(frozen=True)
class PairReader:
    """At most `limit` pairs, spread evenly over the shards; those that cannot be used are left out.

    languages: of the captions. left_out: why this process could not use a pair.
    """

    reader: Reader
    languages: tuple[str, ...]
    limit: int
    left_out: list[str] = field(default_factory=list)

    @staticmethod
    def open(data: DataConfig, limit: int) -> "PairReader":
        """Opens the pairs of `data.shards`.

        Raises:
            DataError: a shard cannot be read, or no pair has a caption in a wanted language.
        """
        assert data.shards is not None
        reader = Reader.open(data.shards, data)
        check_languages(reader, data.languages())
        return PairReader(reader, data.languages(), limit)

    def __len__(self) -> int:
        return min(self.limit, len(self.reader.index))

    @cached_property
    def has_images(self) -> bool:
        """Whether the first shard has images."""
        return bool((self.reader.index.rows(0).image_length >= 0).any())

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        return list(self.reader.spread(self.limit))

    def read(self, numbers: Iterable[int], size: int | None) -> Iterator[Pair]:
        """Yields the pairs of these numbers, 0..len - 1, `size` pixels a side, without those that cannot be used; None
        reads no image."""
        parts = PARTS[1:] if size is None else PARTS
        for number in numbers:
            shard, row = self._places[number]
            key = self.reader.index.key(shard, row)
            try:
                data, text, meta = self.reader.read(shard, row, parts)
                image = NO_IMAGE if size is None else decode_crop(data, size, CentralSquare())
                yield Pair(number, key, image, by_language(text, meta, self.languages), meta)
            except BadSample as error:
                self.left_out.append(f"shard '{redact_url(self.reader.index.urls[shard])}', key '{key}': {error}")

    def captioned_share(self, size: int, batch: int) -> Iterator[list[Pair]]:
        """Yields this rank's pairs that have a caption, in batches."""
        return self.share(size, batch, lambda pair: bool(pair.captions))

    def share(self, size: int | None, batch: int, wanted: Callable[[Pair], bool]) -> Iterator[list[Pair]]:
        """Yields this rank's pairs that are wanted, in batches; `size` as of `read`."""
        pairs = (pair for pair in self.read(share(len(self)), size) if wanted(pair))
        while found := list(itertools.islice(pairs, batch)):
            yield found

    def report(self) -> None:
        """Warn of the pairs that all ranks have left out; a collective call."""
        left_out = list(dict.fromkeys(hardware.gather(self.left_out)))  # some are read several times
        self.left_out.clear()
        if left_out:
            log.warning(
                "%d of %d pairs cannot be used and were left out; the first: %s", len(left_out), len(self), left_out[0]
            )


def held_out_shards(data: DataConfig) -> str | None:
    """Returns the shards that a run with this data holds out; None where it holds out none."""
    return sources_of(data).held_out


def open_pairs(config: PairsConfig, context: EvalContext, language: str | None = None) -> PairReader:
    """Returns the pairs that the options name, with captions in the languages given, 'en' or 'en,de', or the run's.

    Raises:
        RunError: the run has no held-out pairs, and the options name no others.
        DataError: see `PairReader`.
    """
    data = context.pairs or DataConfig(cache=context.cache)
    shards = config.shards or (context.pairs and held_out_shards(data))
    if not shards:
        raise RunError(f"{context.output} was trained without data.held_out; give pairs by the option `shards`")
    return PairReader.open(replace(data, shards=shards, language=language or data.language), config.limit)


def open_texts(config: PairsConfig, context: EvalContext, kinds: Sequence[str], languages: Sequence[str]) -> PairReader:
    """Returns the rows of texts that the options name, or those that the run holds out of the first of these kinds.

    Raises:
        RunError: the run has held none out, and the options name no others.
        DataError: a shard cannot be read.
    """
    if config.shards:
        data = context.pairs or DataConfig(cache=context.cache)
        return PairReader(Reader.open(config.shards, data, images_needed=False), tuple(languages), config.limit)
    for kind in kinds:
        samples: Any
        for samples in context.held_out.values():
            if samples.kind == kind:
                return PairReader(samples.reader, tuple(languages), config.limit)
    raise RunError(f"{context.output} has held out no {' or '.join(kinds)} data; give rows by the option `shards`")


def check_tokens(languages: Sequence[str], context: EvalContext, option: str) -> None:
    """Raise RunError where the tokenizer has language tokens, but not of these."""
    known = context.tokenizer.languages if context.tokenizer else ()
    if known and (lacking := [one for one in languages if one not in known]):
        raise RunError(f"{option} has {','.join(lacking)}, but the tokenizer only has tokens for {','.join(known)}")


def name_of_pairs(config: PairsConfig) -> str:
    """Returns the name of the pairs in a record of results."""
    return without_signatures(config.shards or "held-out pairs")


def tokens_of(texts: Sequence[str], tokenizer: Tokenizer, length: int, language: str) -> Tensor:
    """Returns int64 [B, T] on this rank's device: BOS … EOS PAD, the language's token after EOS where it has one."""
    known = language if language in tokenizer.language_tokens else None
    rows = [tokenizer.encode(text, length, known) for text in texts]
    return torch.from_numpy(np.stack(rows)).to(hardware.device())


def images_of(pairs: Sequence[Pair]) -> Tensor:
    """Returns the images, uint8 [B, 3, S, S], on this rank's device."""
    return torch.from_numpy(np.stack([pair.image for pair in pairs])).to(hardware.device())
