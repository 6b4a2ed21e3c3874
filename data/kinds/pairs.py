"""Image-text pairs: where each lies, its bytes, its crops and its caption; what cannot be used is replaced."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mug.data.builders.embedded import sources_of
from mug.data.config import DataConfig
from mug.data.crops import Crop, ViewConfig, random_crop
from mug.data.decode import Mode, decode_crops
from mug.data.kinds.samples import Shape
from mug.data.languages import check_languages
from mug.data.reader import Parts
from mug.data.row_samples import Place, RowSamples, load_tokenizer, open_rows

Config = DataConfig


@dataclass(frozen=True, eq=False)
class ImageSamples(RowSamples):
    """Rows with an image, which is seen in one crop, that of `view`, or in several.

    views: random crops of an image that a batch holds; without any, it holds the one of `view`. Where `view` is that
        of evaluation, they are the same each time.
    """

    image_size: int
    decode: Mode
    views: tuple[ViewConfig, ...]

    @classmethod
    def further(cls, config: Any, shape: Shape) -> tuple:
        return shape.image_size, config.decode, shape.views

    def pixels(self, place: Place, image: bytes) -> dict[str, np.ndarray]:
        """Returns `image` uint8 [3, S, S], or with V views `views` uint8 [V, 3, S, S].

        Raises:
            BadSample: it cannot be decoded.
        """
        views_VCSS = decode_crops(image, self.image_size, self._crops(place.epoch, place.position), self.decode)
        return {"views": views_VCSS} if self.views else {"image": views_VCSS[0]}

    def _crops(self, epoch: int, position: int) -> list[Crop]:
        if not self.views:
            return [self.view.crop(epoch, position)]
        return [random_crop(one, self.view.seed, epoch, position, v) for v, one in enumerate(self.views)]


@dataclass(frozen=True, eq=False)
class Pairs(ImageSamples):
    """The image-text pairs of an index.

    A batch has `image` uint8 [B, 3, S, S], or with V views `views` uint8 [B, V, 3, S, S]; if there is a tokenizer,
    `tokens` int64 [B, T], BOS first, EOS last, PAD after, all PAD where a pair has no caption; if it has languages,
    that of the caption after EOS, and `language` int64 [B], its number; `position` int64 [B].

    rotate: take the languages of a pair in turn, one an epoch, instead of drawing among all its captions.
    """

    rotate: bool

    kind: ClassVar[str] = "pairs"

    @classmethod
    def further(cls, config: Any, shape: Shape) -> tuple:
        return *super().further(config, shape), config.rotate

    def sample(self, place: Place, parts: Parts) -> Mapping[str, np.ndarray]:
        """Returns the image and the caption of a pair."""
        pixels = self.pixels(place, parts[0])
        if self.tokenizer is None:
            return pixels
        language, caption = self._caption(place, parts)
        text = {"tokens": self.encode(caption, language)}
        return {**pixels, **text, **({"language": self.language_number(language)} if self.tokenizer.languages else {})}

    def _caption(self, place: Place, parts: Parts) -> tuple[str, str]:
        """Returns the language and the caption that are taken; the first language and "" where there is none."""
        found = self.texts(place, parts)
        if self.rotate and found:
            key = self.reader.index.key(place.shard, place.row)
            language = list(found)[self.view.turn(place.epoch, key) % len(found)]
            found = {language: found[language]}
        # A caption that several languages share is drawn no more often than others, and counts as the first one's.
        language_of = {text: one for one, texts in reversed(found.items()) for text in texts}
        captions = list(dict.fromkeys(text for texts in found.values() for text in texts))
        if not captions:
            return self.languages[0], ""
        caption = captions[int(self.view.caption(place.epoch, place.position) * len(captions))]
        return language_of[caption], caption


def open_train(config: DataConfig, seed: int, shape: Shape) -> Pairs:
    """Returns the pairs to train on; builds the embedded ones where no shards are given.

    `seed` sets the order of the samples, the crops, the flips and the choice among captions.

    Raises:
        DataError: shards or tokenizer are missing or damaged, or no pair has a caption in a language that is wanted.
    """
    sources = sources_of(config)
    return _open(config, shape, sources.train, sources.tokenizer, seed)


def open_held_out(config: DataConfig, shape: Shape) -> Pairs | None:
    """Returns the held-out pairs, in the order of the shards; None where there are none.

    Raises:
        DataError: shards or tokenizer are missing or damaged.
    """
    sources = sources_of(config)
    if sources.held_out is None:
        return None
    return _open(config, shape, sources.held_out, sources.tokenizer)


def _open(config: DataConfig, shape: Shape, patterns: str, tokenizer: str | None, seed: int | None = None) -> Pairs:
    loaded = None if shape.text_length is None else load_tokenizer(tokenizer, config)
    pairs = open_rows(Pairs, patterns, config, shape, loaded, seed)
    if loaded:
        check_languages(pairs.reader, config.languages())
    return pairs
