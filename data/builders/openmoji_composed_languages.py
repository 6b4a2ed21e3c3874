"""The pictures of openmoji_compositions.py for kinds that read several languages: the ten whose captions are phrases.

The same shards, with a Unigram tokenizer of all captions and a token for each language.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path

from mug.data.builders import openmoji_compositions as compositions
from mug.data.builders.composed_captions import RELATIONS
from mug.data.builders.openmoji import built_once
from mug.data.builders.unigram_training import train_unigram

VERSION = 1  # raise it whenever the tokenizer that this file trains changes
VOCABULARY = 1536


def build(folder: Path) -> None:
    """Write the shards, the tokenizer and the licence into `folder`, which exists and is empty."""
    compositions.write_splits(folder)
    captions = (phrase for language in RELATIONS for phrase in compositions.phrases(language))
    train_unigram(captions, VOCABULARY, tuple(RELATIONS)).save(str(folder / "tokenizer.json"))


def folder_name() -> str:
    """Returns the name of the built folder: another builder or package has another name."""
    parts = f"{VERSION} {compositions.folder_name()} sentencepiece {version('sentencepiece')}"
    return f"composed-languages-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"


def ensure_composed_languages(cache: Path) -> Path:
    """Returns the folder of the shards under `cache`, built now, by one process, if it is not there.

    Raises:
        DataError: the cache folder cannot be written.
    """
    return built_once(cache, folder_name(), build, "pictures of one or two drawings, captioned in ten languages")
