"""Descriptions of Debian's packages and their translations by volunteers, paragraph by paragraph.

Read from the lists that apt fetches, best into a folder of their own, a few languages at a time:

    mkdir -p lists/partial
    apt-get update -o Dir::State::Lists=$PWD/lists -o Acquire::Languages=en,de,fr -o Acquire::GzipIndexes=false
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from mug.data.builders.writers import Sample, text_sample
from mug.data.captions import clean
from mug.data.errors import DataError
from mug.data.left_out import LeftOut

LICENCE = "that of each package: free software by the Debian Free Software Guidelines"
ATTRIBUTION = "descriptions of Debian packages, translated by the Debian Description Translation Project"
ENGLISH = "en"
# Debian's codes → those of CLDR, whose `pt` is Brazil's and whose `zh` is written in simplified letters.
CODES = {"pt_BR": "pt", "pt": "pt-PT", "zh_CN": "zh", "zh_TW": "zh-Hant", "zh": "zh"}

Paragraphs = dict[str, list[str]]  # Description-md5, of the English text → paragraphs


def read_descriptions(source: Path, left_out: LeftOut) -> list[Sample]:
    """Returns the English paragraphs that have a translation, `captions` in all languages; the key hashes the English.

    Texts that are the same in many packages are one sample, so that a split by the key does not share them.

    source: a folder with apt's lists, of which `*_i18n_Translation-XX` are read.

    Raises:
        DataError: there are no lists in English and another language, or one is compressed.
    """
    english, others = _lists(source, left_out)
    captions: dict[str, dict[str, str]] = {}
    for language, translated in others.items():
        for md5, paragraphs in translated.items():
            originals = english.get(md5, [])
            if len(originals) != len(paragraphs):
                left_out.add("descriptions with other paragraphs than the English", f"{md5} in '{language}'")
                continue
            for original, text in zip(originals, paragraphs, strict=True):
                if text == original:
                    left_out.add("paragraphs that are not translated", f"'{text[:60]}' in '{language}'")
                elif captions.setdefault(original, {ENGLISH: original}).setdefault(language, text) != text:
                    left_out.add("further translations of a paragraph", f"'{text[:60]}' in '{language}'")
    by_key = {hashlib.sha256(original.encode()).hexdigest()[:24]: some for original, some in sorted(captions.items())}
    return [text_sample(key, some, LICENCE, ATTRIBUTION) for key, some in by_key.items()]


def _lists(source: Path, left_out: LeftOut) -> tuple[Paragraphs, dict[str, Paragraphs]]:
    """Returns the English descriptions, and language → translated ones, in alphabetical order."""
    found: dict[str, Paragraphs] = {}
    for path in sorted(source.glob("*_i18n_Translation-*")) if source.is_dir() else []:
        code = path.name.rpartition("Translation-")[2]
        if "." in code:
            raise DataError(f"'{path}' is compressed: fetch the lists with apt-get -o Acquire::GzipIndexes=false")
        of_language = found.setdefault(CODES.get(code, code.replace("_", "-")), {})
        with open(path, encoding="utf-8", errors="replace") as file:
            for md5, paragraphs in _descriptions(file, f"Description-{code}"):
                if of_language.setdefault(md5, paragraphs) != paragraphs:
                    left_out.add("further texts of a description", f"{md5} in '{path.name}'")
    english = found.pop(ENGLISH, {})
    if not english or not found:
        raise DataError(
            f"'{source}' has no lists *_i18n_Translation-en and of another language: fetch them with apt-get update -o"
            " Dir::State::Lists=FOLDER -o Acquire::Languages=en,de"
        )
    return english, {language: found[language] for language in sorted(found)}


def _descriptions(lines: Iterator[str], field: str) -> Iterator[tuple[str, list[str]]]:
    """Yields md5 and paragraphs, the short description first, of a list of stanzas (deb822)."""
    md5, paragraphs, inside = "", [], False
    for line in lines:
        if not line.strip():
            if md5 and paragraphs:
                yield md5, _cleaned(paragraphs)
            md5, paragraphs, inside = "", [], False
        elif line.startswith(" "):
            if inside:
                paragraphs += [[]] if line.strip() == "." else []
                paragraphs[-1] += [] if line.strip() == "." else [line]
        else:
            name, _, value = line.partition(":")
            inside = name == field
            md5 = value.strip() if name == "Description-md5" else md5
            paragraphs = [[value], []] if inside else paragraphs
    if md5 and paragraphs:
        yield md5, _cleaned(paragraphs)


def _cleaned(paragraphs: list[list[str]]) -> list[str]:
    return [text for lines in paragraphs if (text := clean("".join(lines)))]
