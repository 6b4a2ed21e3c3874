"""Options of the data. Imports neither torch nor numpy: the command line parses this file."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mug.data.errors import DataError

Embedded = Literal["drawings", "compositions", "languages", "composed_languages"]


@dataclass
class FetchConfig:
    """How shards in a store (s3://, gs://, hf://, https://) are read. Local shards need none of it.

    Args:
        remote: 'cache' fetches complete shards to this machine's disk, where all processes share them; 'ranged' reads
            each sample from the store when it is needed and puts nothing on the disk.
        cache_gb: Disk space for the cache, in 10^9 bytes. It should hold the shards that all ranks and workers of a
            machine read at one time and those they prefetch; the least recently used are evicted.
        prefetch: Shards that each worker fetches ahead of the one it reads, all at once; where `remote` is ranged,
            reads that it has under way.
        retry_seconds: How long one shard may go without any progress before the run stops.
    """

    remote: str = "cache"
    cache_gb: float = 100.0
    prefetch: int = 4
    retry_seconds: float = 300.0

    def __post_init__(self):
        if self.remote not in ("cache", "ranged"):
            raise DataError(f"data.remote is '{self.remote}': give cache or ranged")
        if not self.cache_gb > 0:
            raise DataError(f"data.cache_gb is {self.cache_gb}: give more than 0")
        if self.prefetch < 0:
            raise DataError(f"data.prefetch is {self.prefetch}: give 0 or more")
        if not self.retry_seconds >= 0:
            raise DataError(f"data.retry_seconds is {self.retry_seconds}: give 0 or more")


@dataclass
class TextConfig(FetchConfig):
    """Where texts come from, with images or without.

    Args:
        shards: Shards to train on, tar, Arrow or Parquet: paths, URLs, globs or brace ranges
            ('cc3m/{00000..00331}.tar'), separated by commas or spaces; or the folder of an index that
            run/index_shards.py wrote. '{language}' in it stands for each of the languages, whose shards it names.
            Without it, the embedded ones.
        embedded: What to take without `shards`: OpenMoji's single drawings with names in 14 languages, and a tokenizer
            of the English ones ('drawings') or of all ('languages'); or compositions of one or two drawings, with
            captions as "a cake above an owl", and a tokenizer of the English ones ('compositions') or of those in
            ten languages ('composed_languages').
        held_out: Shards to evaluate on, written like `shards`. Without it, the held-out embedded ones where
            `shards` is left out too, else no evaluation.
        tokenizer: A tokenizer.json, a folder that holds one, or a name on the Hugging Face hub. Without it,
            the tokenizer of the embedded ones; own shards need one.
        special_tokens: Its tokens for pad, bos, eos or mask, where they differ from those that it states:
            {"pad": "<|pad|>"}.
        cache: Folder for what is built once. Without it, $MUG_CACHE, else ~/.cache/mug.
        language: Languages to choose captions from, 'en' or 'en,de,fr': one caption of a pair is drawn in each
            epoch. English is the .txt and `captions.en` in the .json, another language `captions.LANGUAGE`; the
            .txt stands in where a pair has none in any of them.
        exponent: Where shards are named by '{language}', a language of n samples has a share of n^exponent: 1 goes by
            their number, 0 is the same for all.
        text_length: Max tokens of a text, with BOS, EOS and its language's; the model's text_length if left out.
        caption: The column (Arrow, Parquet) or extension (tar, 'caption.txt') that holds the captions. Without it, txt,
            caption, text and other usual names, in any case.
        workers: Processes per rank that read and decode; 0 works in the training process itself.
        max_bad_fraction: Share of the samples that may be unusable, and are replaced, before the run stops.
        max_bad_fraction_in_shard: Likewise of one shard, in one epoch.
    """

    shards: str | None = None
    embedded: Embedded = "languages"
    held_out: str | None = None
    tokenizer: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    cache: str | None = None
    language: str = "en"
    exponent: float = 1.0
    text_length: int | None = None
    caption: str | None = None
    workers: int = 2
    max_bad_fraction: float = 0.01
    max_bad_fraction_in_shard: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.exponent <= 1:
            raise DataError(f"data.exponent is {self.exponent}: give 0 to 1")
        if self.workers < 0:
            raise DataError(f"data.workers is {self.workers}: give 0 or more")
        if self.text_length is not None and self.text_length < 1:
            raise DataError(f"data.text_length is {self.text_length}: give 1 or more, or leave it out")
        for name in ("max_bad_fraction", "max_bad_fraction_in_shard"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"data.{name} is {getattr(self, name)}: give 0 to 1")
        self.languages()
        if self.caption == "":
            raise DataError("data.caption is empty: give a column or an extension, or leave it out")

    def languages(self) -> tuple[str, ...]:
        """Returns the languages of the captions, in the order given."""
        languages = tuple(part.strip() for part in self.language.split(","))
        if not all(languages):
            raise DataError(f"data.language is '{self.language}': give languages, as 'en' or 'en,de'")
        return languages

    def cache_folder(self) -> Path:
        """Returns the folder for what is built once; it need not exist yet.

        Raises:
            DataError: the home folder does not exist.
        """
        folder = self.cache or os.environ.get("MUG_CACHE") or "~/.cache/mug"
        try:
            return Path(folder).expanduser()
        except RuntimeError as error:
            raise DataError(f"cache folder '{folder}': {error} Set data.cache or $MUG_CACHE to a full path") from None


@dataclass
class DataConfig(TextConfig):
    """Where the image-text pairs come from and how training looks at them.

    Args:
        rotate: Go through the languages that a pair has, one an epoch, instead of drawing among all its captions: in as
            many epochs each (image, language) comes once.
        crop_scale: Min and max share of the image's area that a random training crop covers.
        flip: Mirror half of the training images.
        decode: 'exact' decodes at full size; 'fast' decodes a JPEG at 1/2, 1/4 or 1/8 where the crop allows, for a
            mean error below 1 of 255.
    """

    embedded: Embedded = "drawings"
    rotate: bool = False
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    decode: Literal["exact", "fast"] = "exact"

    def __post_init__(self):
        super().__post_init__()
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise DataError(f"data.crop_scale is {low}, {high}: give 0 < min <= max <= 1")
