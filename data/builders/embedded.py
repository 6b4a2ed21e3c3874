"""The embedded image-text pairs: built from Python packages on first use, so that they need no download."""

from collections.abc import Callable
from pathlib import Path

from mug.data.builders.openmoji import ensure_openmoji
from mug.data.builders.openmoji_compositions import ensure_compositions
from mug.data.config import DataConfig

BUILDERS: dict[str, Callable[[Path], Path]] = {"drawings": ensure_openmoji, "compositions": ensure_compositions}


def ensure_embedded(config: DataConfig) -> Path:
    """Returns the folder of the shards and the tokenizer of `config.embedded`, built now if it is not there.

    Raises:
        DataError: the cache folder cannot be written.
    """
    return BUILDERS[config.embedded](config.cache_folder())
