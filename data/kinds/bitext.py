"""Translations: two texts of a row in each epoch, its pairs of languages in turn; what cannot be used is replaced."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mug.data.builders.embedded import Sources
from mug.data.config import TextConfig
from mug.data.errors import BadSample, DataError
from mug.data.index.rows import PARTS
from mug.data.kinds.samples import Shape
from mug.data.kinds.text import open_languages
from mug.data.reader import Parts
from mug.data.row_samples import Place, RowSamples, open_rows
from mug.data.tokenizer import Tokenizer

Config = TextConfig

MAX_SIDE = 5_000  # characters: more is not a sentence, and may have been cut


@dataclass(frozen=True, eq=False)
class Bitext(RowSamples):
    """The translations of an index: the json of a row has `captions` in at least two of the languages.

    A batch has `source` int64 [B, T], BOS first, EOS and the language's token last, PAD after; `target` int64 [B, T],
    the language's token first, EOS last, PAD after; `source_language` and `target_language` int64 [B], their numbers
    among the tokenizer's; `position` int64 [B].
    """

    kind: ClassVar[str] = "bitext"
    parts: ClassVar[tuple[str, ...]] = PARTS[1:]

    def sample(self, place: Place, parts: Parts) -> Mapping[str, np.ndarray]:
        """Returns a translation of the row, between the two languages whose turn it is."""
        return translation(self, place, parts)


def translation(samples: RowSamples, place: Place, parts: Parts) -> dict[str, np.ndarray]:
    """Returns `source`, `target` int64 [T] and their languages, int64 [].

    Of n languages of a row, the n(n-1) ordered pairs come in turn, one an epoch; in evaluation, always from the first
    of them to the second.

    Raises:
        BadSample: the row has fewer than two of the languages, or one side is too long to be whole.
    """
    found = samples.wanted_texts(place, parts)
    if len(found) < 2:
        raise BadSample(f"a text only in {''.join(found)}, of data.language {','.join(samples.languages)}")
    number = samples.view.turn(place.epoch, samples.reader.index.key(place.shard, place.row))
    first, second = divmod(number % (len(found) * (len(found) - 1)), len(found) - 1)
    source, target = (list(found)[i] for i in (first, second + (second >= first)))
    said, meant = found[source][0], found[target][0]
    if (longest := max(len(said), len(meant))) > MAX_SIDE:
        raise BadSample(f"a side of {longest:,} characters or more, too long for a sentence")
    assert samples.tokenizer is not None
    return {
        "source": samples.encode(said, source),
        "target": samples.tokenizer.encode_target(meant, samples.text_length, target),
        "source_language": samples.language_number(source),
        "target_language": samples.language_number(target),
    }


def open_train(config: TextConfig, seed: int, shape: Shape) -> Bitext:
    """Returns the translations to train on; without shards, the embedded names.

    Raises:
        DataError: shards or tokenizer are missing or damaged, or fewer than two languages are given.
    """
    sources, tokenizer = open_translations(config)
    return open_rows(Bitext, sources.train, config, shape, tokenizer, seed)


def open_held_out(config: TextConfig, shape: Shape) -> Bitext | None:
    """Returns the held-out translations, in the order of the shards; None where there are none.

    Raises:
        DataError: see `open_train`.
    """
    sources, tokenizer = open_translations(config)
    if sources.held_out is None:
        return None
    return open_rows(Bitext, sources.held_out, config, shape, tokenizer)


def open_translations(config: TextConfig) -> tuple[Sources, Tokenizer]:
    """Returns where the samples lie, and the tokenizer; see `open_languages`.

    Raises:
        DataError: fewer than two languages are given.
    """
    if len(set(config.languages())) < 2:
        raise DataError(f"data.language is '{config.language}': give two languages or more to translate between")
    return open_languages(config)
