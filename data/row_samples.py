"""Samples that are rows of shards: read by position, and replaced where they cannot be used."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from mug.data.bad_samples import Replacement
from mug.data.captions import TEXT_LANGUAGE, by_language
from mug.data.config import DataConfig, TextConfig
from mug.data.errors import BadSample, DataError
from mug.data.index.rows import PARTS
from mug.data.kinds.samples import Batch, Shape
from mug.data.language_order import LanguageOrder, order_of
from mug.data.order import Order
from mug.data.reader import Parts, Reader
from mug.data.store.expand import expand
from mug.data.store.remote import redact_url
from mug.data.tokenizer import Tokenizer
from mug.data.views import EvaluationView, TrainView, View

LANGUAGE = "{language}"  # in the names of shards

log = logging.getLogger("mug")


@dataclass(frozen=True)
class Place:
    """Where a sample is, and when: its position in the order, and the row that is read for it."""

    position: int
    epoch: int
    shard: int
    row: int


@dataclass(frozen=True, eq=False)
class Shards:
    """Open shards. languages_S: the language that each is named by; empty where they are not."""

    reader: Reader
    languages_S: tuple[str, ...] = ()

    @staticmethod
    def open(patterns: str, config: TextConfig, images_needed: bool = True) -> "Shards":
        """Opens the shards that `patterns` name, `{language}` in it standing for each of the config's languages.

        Raises:
            DataError: a shard is missing or cannot be used, or holds no images where they are needed.
        """
        if LANGUAGE not in patterns:
            return Shards(Reader.open(patterns, config, images_needed))
        urls = {one: expand(patterns.replace(LANGUAGE, one)) for one in config.languages()}
        reader = Reader.open([url for some in urls.values() for url in some], config, images_needed)
        return Shards(reader, tuple(language for language, some in urls.items() for _ in some))

    def view(self, config: TextConfig, seed: int | None) -> View:
        """Returns the view of training, whose order `seed` sets; without it, that of evaluation."""
        if seed is None:
            return EvaluationView(self.reader.index.counts_S)
        order = order_of(self.reader.index.counts_S, self.languages_S, config.exponent, seed)
        crops = (tuple(config.crop_scale), config.flip) if isinstance(config, DataConfig) else ((1.0, 1.0), False)
        return TrainView(order, *crops)


@dataclass(frozen=True, eq=False)
class RowSamples:
    """Samples by position, as `view` shows them: mug.data.kinds.samples.Samples. A kind says what a row becomes.

    tokenizer: None, and a text length of 0, leave the texts out.
    languages: in which texts are wanted.
    parts: of a row, that are read.
    """

    shards: Shards
    view: View
    tokenizer: Tokenizer | None
    text_length: int
    languages: tuple[str, ...]

    kind: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = PARTS

    def __post_init__(self):
        framing = 2 if self.tokenizer is None or not self.tokenizer.languages else 3
        if self.tokenizer is not None and self.text_length <= framing:
            raise DataError(
                f"text length {self.text_length} leaves no token between BOS and EOS: give {framing + 1} or more"
            )

    @classmethod
    def further(cls, config: Any, shape: Shape) -> tuple:
        """Returns the fields that a kind has in addition."""
        return ()

    @property
    def reader(self) -> Reader:
        """Returns the reader of the shards."""
        return self.shards.reader

    @property
    def order(self) -> Order | LanguageOrder | None:
        """Returns the order of training, None where positions number the rows themselves."""
        return self.view.order

    @property
    def class_names(self) -> tuple[str, ...]:
        """Returns the names of the labels, where there are some."""
        return ()

    def __len__(self) -> int:
        """Returns the number of samples in the shards."""
        return len(self.reader.index)

    def identity(self) -> dict[str, str]:
        """Returns what a position's sample depends on, besides the order."""
        identity = {"fingerprint": self.reader.index.fingerprint}
        return identity if self.tokenizer is None else identity | {"tokenizer": self.tokenizer.fingerprint}

    def files(self) -> dict[str, str]:
        """Returns what a checkpoint keeps, by file name."""
        return {} if self.tokenizer is None else {"tokenizer.json": self.tokenizer.to_json()}

    def sample(self, place: Place, parts: Parts) -> Mapping[str, np.ndarray]:
        """Returns the sample that is made of a row, as arrays by name.

        Raises:
            BadSample: the row cannot be used.
        """
        raise NotImplementedError

    def batch(self, positions: Sequence[int]) -> tuple[Batch, list[Replacement]]:
        """Returns B samples, and which of them stand in for others.

        Raises:
            DataError: a shard cannot be read, or so much of it cannot be used that nothing stands in.
        """
        positions_B = np.asarray(positions, dtype=np.int64)
        samples: list[Mapping[str, np.ndarray]] = []
        replaced: list[Replacement] = []
        located = [array.tolist() for array in (positions_B, *self.view.locate(positions_B))]
        places = [Place(*values) for values in zip(*located, strict=True)]
        reads = self.reader.ahead([(place.shard, place.row) for place in places], self.parts)
        for place, read in zip(places, reads, strict=True):
            found, bad = self._usable(place, read)
            samples.append(found)
            replaced += bad
        tensors = {name: torch.from_numpy(np.stack([one[name] for one in samples])) for name in samples[0]}
        return Batch(self.kind, {**tensors, "position": torch.from_numpy(positions_B)}), replaced

    def _usable(self, place: Place, read: Callable[[], Parts]) -> tuple[Mapping[str, np.ndarray], list[Replacement]]:
        """Returns the sample at a place, and those that could not be used there."""
        index, bad, shard = self.reader.index, [], place.shard
        count = int(index.counts_S[shard])
        for substitute in (None, *self.view.substitutes(place.epoch, place.position)):
            if substitute is not None:
                place = Place(place.position, place.epoch, shard, int(substitute) % count)
                read = partial(self.reader.read, shard, place.row, self.parts)
            try:
                return self.sample(place, read()), bad
            except BadSample as error:
                url, key = redact_url(index.urls[shard]), index.key(shard, place.row)
                bad.append(Replacement(place.position, url, key, str(error), count, place.epoch))
        raise DataError(
            f"shard '{bad[-1].shard}': {len(bad)} samples in a row cannot be used, the last '{bad[-1].key}':"
            f" {bad[-1].reason}; rewrite the shard or leave it out"
        )

    def texts(self, place: Place, parts: Parts) -> dict[str, list[str]]:
        """Returns language → texts of a row, cleaned, in the order of `languages`.

        Where it has none in them, its plain text, which is in English or in the language that the shard is named by.

        Raises:
            BadSample: it has no plain text, and its json cannot be parsed.
        """
        named = self.shards.languages_S
        _, text, meta = parts
        return by_language(text, meta, self.languages, named[place.shard] if named else TEXT_LANGUAGE)

    def wanted_texts(self, place: Place, parts: Parts) -> dict[str, list[str]]:
        """Returns language → texts of a row, cleaned, in the order of `languages`.

        Raises:
            BadSample: it has none in any of them.
        """
        found = {one: texts for one, texts in self.texts(place, parts).items() if one in self.languages}
        if not found:
            raise BadSample(f"no text in data.language {','.join(self.languages)}")
        return found

    def text_in_turn(self, place: Place, parts: Parts) -> tuple[str, str]:
        """Returns a text of a row, in the language whose turn it is, after that language.

        Raises:
            BadSample: it has none in any of them.
        """
        found = self.wanted_texts(place, parts)
        language = list(found)[self.view.turn(place.epoch, self.reader.index.key(place.shard, place.row)) % len(found)]
        texts = found[language]
        return language, texts[int(self.view.caption(place.epoch, place.position) * len(texts))]

    def encode(self, text: str, language: str) -> np.ndarray:
        """Returns int64 [T]: BOS, the text, EOS, and where the tokenizer has languages, that of the text; then PAD.

        Raises:
            BadSample: it has languages, but not this one.
        """
        assert self.tokenizer is not None
        if not self.tokenizer.languages:
            return self.tokenizer.encode(text, self.text_length)
        self.language_number(language)
        return self.tokenizer.encode(text, self.text_length, language)

    def language_number(self, language: str) -> np.ndarray:
        """Returns the number of a language among the tokenizer's, int64 [].

        Raises:
            BadSample: it is none of them.
        """
        assert self.tokenizer is not None
        if language not in self.tokenizer.language_tokens:
            raise BadSample(f"a text in '{language}', a language for which the tokenizer has no token")
        return np.array(self.tokenizer.languages.index(language), np.int64)


Rows = TypeVar("Rows", bound=RowSamples)


def open_rows(
    kind: type[Rows],
    patterns: str,
    config: TextConfig,
    shape: Shape,
    tokenizer: Tokenizer | None,
    seed: int | None = None,
) -> Rows:
    """Returns the samples of a kind in the shards: to train on, in an order that `seed` sets, or to evaluate on.

    Raises:
        DataError: a shard is missing or cannot be used, or see `text_length_of`.
    """
    shards = Shards.open(patterns, config, images_needed=kind.parts == PARTS)
    texts = (None, 0, ()) if tokenizer is None else (tokenizer, text_length_of(config, shape), config.languages())
    rows = kind(shards, shards.view(config, seed), *texts, *kind.further(config, shape))
    if tokenizer and tokenizer.added and seed is not None:
        log.info("the tokenizer lacked special tokens, so these were added: %s", ", ".join(tokenizer.added))
    return rows


def load_tokenizer(found: object, config: TextConfig) -> Tokenizer:
    """Loads the tokenizer of a stream: `found` is its tokenizer.json, or None.

    Raises:
        DataError: it is missing or damaged, or lacks language tokens that the config names.
    """
    if found is None:
        raise DataError("data.shards is given without data.tokenizer: give a tokenizer.json or a hub tokenizer")
    tokenizer = Tokenizer.load(str(found), config.special_tokens)
    lacking = [one for one in config.languages() if one not in tokenizer.language_tokens]
    if tokenizer.languages and lacking:
        raise DataError(
            f"data.language has {','.join(lacking)}, for which the tokenizer has no token; it has"
            f" {','.join(tokenizer.languages)}"
        )
    return tokenizer


def text_length_of(config: TextConfig, shape: Shape) -> int:
    """Returns the max tokens of a text.

    Raises:
        DataError: the model reads fewer, or no texts.
    """
    if shape.text_length is None:
        raise DataError("the objective reads no texts: leave out the streams of texts")
    if config.text_length is not None and config.text_length > shape.text_length:
        raise DataError(f"data.text_length {config.text_length} is more than model.text_length {shape.text_length}")
    return config.text_length or shape.text_length
