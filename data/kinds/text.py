"""Texts, one of a row in each epoch, its languages in turn; what cannot be used is replaced."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mug.data.builders.embedded import Sources, sources_of
from mug.data.config import TextConfig
from mug.data.errors import DataError
from mug.data.index.rows import PARTS
from mug.data.kinds.samples import Shape
from mug.data.reader import Parts
from mug.data.row_samples import Place, RowSamples, load_tokenizer, open_rows
from mug.data.tokenizer import Tokenizer

Config = TextConfig


@dataclass(frozen=True, eq=False)
class Texts(RowSamples):
    """The texts of an index.

    A batch has `tokens` int64 [B, T], BOS first, EOS and the language's token last, PAD after; `language` int64 [B],
    its number among the tokenizer's; `position` int64 [B].
    """

    kind: ClassVar[str] = "text"
    parts: ClassVar[tuple[str, ...]] = PARTS[1:]

    def sample(self, place: Place, parts: Parts) -> Mapping[str, np.ndarray]:
        """Returns a text of the row, in the language whose turn it is."""
        language, text = self.text_in_turn(place, parts)
        return {"tokens": self.encode(text, language), "language": self.language_number(language)}


def open_train(config: TextConfig, seed: int, shape: Shape) -> Texts:
    """Returns the texts to train on; without shards, the embedded names.

    Raises:
        DataError: shards or tokenizer are missing or damaged, or the tokenizer has no language tokens.
    """
    sources, tokenizer = open_languages(config)
    return open_rows(Texts, sources.train, config, shape, tokenizer, seed)


def open_held_out(config: TextConfig, shape: Shape) -> Texts | None:
    """Returns the held-out texts, in the order of the shards; None where there are none.

    Raises:
        DataError: see `open_train`.
    """
    sources, tokenizer = open_languages(config)
    if sources.held_out is None:
        return None
    return open_rows(Texts, sources.held_out, config, shape, tokenizer)


def open_languages(config: TextConfig) -> tuple[Sources, Tokenizer]:
    """Returns where the samples lie, and the tokenizer, which has a token for each language.

    Raises:
        DataError: the tokenizer is not given, or is damaged or lacks such tokens.
    """
    sources = sources_of(config)
    tokenizer = load_tokenizer(sources.tokenizer, config)
    if not tokenizer.languages:
        raise DataError("data.tokenizer has no language tokens: train one with run/train_tokenizer.py --model unigram")
    return sources, tokenizer
