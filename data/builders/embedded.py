"""The embedded image-text pairs: built from Python packages on first use, so that they need no download."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mug.data.builders.openmoji import ensure_openmoji
from mug.data.builders.openmoji_composed_languages import ensure_composed_languages
from mug.data.builders.openmoji_compositions import ensure_compositions
from mug.data.builders.openmoji_languages import ensure_languages
from mug.data.config import TextConfig

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "drawings": ensure_openmoji,
    "compositions": ensure_compositions,
    "languages": ensure_languages,
    "composed_languages": ensure_composed_languages,
}


@dataclass(frozen=True)
class Sources:
    """Where samples lie: patterns of shards to train on, and to evaluate on; and their tokenizer."""

    train: str
    held_out: str | None
    tokenizer: str | None


def sources_of(config: TextConfig) -> Sources:
    """Returns the shards and the tokenizer that the options name; without shards, the embedded ones.

    Raises:
        DataError: the cache folder cannot be written.
    """
    if config.shards is not None:
        return Sources(config.shards, config.held_out, config.tokenizer)
    folder = ensure_embedded(config)
    held_out = f"{folder}/held_out-*.tar" if config.held_out is None else config.held_out
    return Sources(f"{folder}/train-*.tar", held_out, str(folder) if config.tokenizer is None else config.tokenizer)


def ensure_embedded(config: TextConfig) -> Path:
    """Returns the folder of the shards and the tokenizer of `config.embedded`, built now if it is not there.

    Raises:
        DataError: the cache folder cannot be written.
    """
    return BUILDERS[config.embedded](config.cache_folder())
