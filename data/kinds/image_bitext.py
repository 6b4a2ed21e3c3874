"""Images with a caption in two languages, its pairs of languages in turn; what cannot be used is replaced."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mug.data.config import DataConfig, Embedded
from mug.data.kinds.bitext import open_translations, translation
from mug.data.kinds.pairs import ImageSamples
from mug.data.kinds.samples import Shape
from mug.data.reader import Parts
from mug.data.row_samples import Place, open_rows


@dataclass
class Config(DataConfig):
    """Where images with translations come from: those of pairs, embedded ones with names in several languages."""

    embedded: Embedded = "languages"


@dataclass(frozen=True, eq=False)
class ImageBitext(ImageSamples):
    """The images of an index with `captions` in at least two of the languages.

    A batch has `image` uint8 [B, 3, S, S], or with V views `views` uint8 [B, V, 3, S, S], and what one of
    `mug.data.kinds.bitext.Bitext` has.
    """

    kind: ClassVar[str] = "image_bitext"

    def sample(self, place: Place, parts: Parts) -> Mapping[str, np.ndarray]:
        """Returns the image of a row, and a translation between the two languages whose turn it is."""
        return {**translation(self, place, parts), **self.pixels(place, parts[0])}


def open_train(config: DataConfig, seed: int, shape: Shape) -> ImageBitext:
    """Returns the images to train on; without shards, the embedded drawings.

    Raises:
        DataError: shards or tokenizer are missing or damaged, or fewer than two languages are given.
    """
    sources, tokenizer = open_translations(config)
    return open_rows(ImageBitext, sources.train, config, shape, tokenizer, seed)


def open_held_out(config: DataConfig, shape: Shape) -> ImageBitext | None:
    """Returns the held-out images, in the order of the shards; None where there are none.

    Raises:
        DataError: see `open_train`.
    """
    sources, tokenizer = open_translations(config)
    if sources.held_out is None:
        return None
    return open_rows(ImageBitext, sources.held_out, config, shape, tokenizer)
