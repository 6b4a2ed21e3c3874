"""Options of the data. Imports neither torch nor numpy: the command line parses this file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mug.data.errors import DataError


@dataclass
class FetchConfig:
    """How shards in a store (s3://, gs://, hf://, https://) are read. Local shards need none of it.

    Args:
        remote: 'cache' fetches whole shards to this machine's disk, where all processes share them; 'ranged' reads
            each sample from the store when it is needed and puts nothing on the disk.
        cache_gb: Disk space for the cache, in 10^9 bytes. It should hold the shards that all ranks and workers of a
            machine read at one time and those they fetch ahead; the longest unused go first.
        ahead: Shards that each worker fetches ahead of the one it reads, all at once; where `remote` is ranged, reads
            that it has under way.
        retry_seconds: How long one shard may go without any progress before the run stops.
    """

    remote: str = "cache"
    cache_gb: float = 100.0
    ahead: int = 4
    retry_seconds: float = 300.0

    def __post_init__(self):
        if self.remote not in ("cache", "ranged"):
            raise DataError(f"data.remote is '{self.remote}': give cache or ranged")
        if not self.cache_gb > 0:
            raise DataError(f"data.cache_gb is {self.cache_gb}: give more than 0")
        if self.ahead < 0:
            raise DataError(f"data.ahead is {self.ahead}: give 0 or more")
        if not self.retry_seconds >= 0:
            raise DataError(f"data.retry_seconds is {self.retry_seconds}: give 0 or more")


@dataclass
class DataConfig(FetchConfig):
    """Where the image-text pairs come from and how training looks at them.

    Args:
        shards: Shards to train on, tar, Arrow or Parquet: paths, URLs, globs or brace ranges
            ('cc3m/{00000..00331}.tar'), separated by commas or spaces; or the folder of an index that
            run/index_shards.py wrote. Without it, the embedded OpenMoji pairs.
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
        decode: 'exact' decodes at full size; 'fast' decodes a JPEG at 1/2, 1/4 or 1/8 where the crop allows, for a
            mean error below 1 of 255.
        workers: Processes per rank that read and decode; 0 works in the training process itself.
        max_bad_samples: Share of the samples that may be unusable, and are replaced, before the run stops.
        max_bad_in_shard: Likewise of one shard, in one epoch.
    """

    shards: str | None = None
    held_out: str | None = None
    tokenizer: str | None = None
    cache: str | None = None
    language: str = "en"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    decode: Literal["exact", "fast"] = "exact"
    workers: int = 2
    max_bad_samples: float = 0.01
    max_bad_in_shard: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise DataError(f"data.crop_scale is {low}, {high}: give 0 < least <= greatest <= 1")
        if self.workers < 0:
            raise DataError(f"data.workers is {self.workers}: give 0 or more")
        for name in ("max_bad_samples", "max_bad_in_shard"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"data.{name} is {getattr(self, name)}: give 0 to 1")
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
