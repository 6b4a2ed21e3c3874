"""Options of the data. Imports neither torch nor numpy: the command line parses this file."""

import os
from dataclasses import dataclass
from pathlib import Path

from mug.data.errors import DataError


@dataclass
class DataConfig:
    """Where the image-text pairs come from and how training looks at them.

    Args:
        shards: Tar shards to train on: paths, globs or brace ranges ('cc3m/{00000..00331}.tar'), separated by
            commas or spaces. Without it, the embedded OpenMoji pairs.
        held_out: Shards to evaluate on, written like `shards`. Without it, the held-out OpenMoji pairs where
            `shards` is left out too, else no evaluation.
        tokenizer: A tokenizer.json, a folder that holds one, or a name on the Hugging Face hub. Without it,
            the tokenizer of the OpenMoji pairs; own shards need one.
        cache: Folder for what is built once. Without it, $MUG_CACHE, else ~/.cache/mug.
        language: Languages to choose captions from, 'en' or 'en,de,fr': one caption of a pair is drawn anew each
            epoch. English is the .txt and `captions.en` in the .json, another language `captions.LANGUAGE`; the
            .txt stands in where a pair has none in any of them.
        crop_scale: Least and greatest share of the image's area that a random training crop covers.
        flip: Mirror half of the training images.
        workers: Processes per rank that read and decode; 0 works in the training process itself.
    """

    shards: str | None = None
    held_out: str | None = None
    tokenizer: str | None = None
    cache: str | None = None
    language: str = "en"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    workers: int = 2

    def __post_init__(self):
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise DataError(f"data.crop_scale is {low}, {high}: give 0 < least <= greatest <= 1")
        if self.workers < 0:
            raise DataError(f"data.workers is {self.workers}: give 0 or more")
        self.languages()

    def languages(self) -> tuple[str, ...]:
        """The languages of the captions, in the order given."""
        languages = tuple(part.strip() for part in self.language.split(","))
        if not all(languages):
            raise DataError(f"data.language is '{self.language}': give languages, as 'en' or 'en,de'")
        return languages

    def cache_folder(self) -> Path:
        """The folder for what is built once; it need not exist yet."""
        return Path(self.cache or os.environ.get("MUG_CACHE") or "~/.cache/mug").expanduser()
