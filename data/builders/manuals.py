"""Manuals that volunteers have translated: their pages by language, and what the languages have in common."""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from mug.data.builders.writers import Sample, text_sample
from mug.data.errors import DataError
from mug.data.left_out import LeftOut

ENGLISH = "en"
# Codes of the packages → those of CLDR, whose `pt` is Brazil's and whose `zh` is written in simplified letters.
CODES = {"en-US": "en", "pt-BR": "pt", "pt": "pt-PT", "zh-CN": "zh", "zh-TW": "zh-Hant"}

Place = TypeVar("Place", bound=Hashable)


def manual_folders(source: Path, inside: str, packages: str) -> dict[str, Path]:
    """Returns language → folder of its pages, in alphabetical order.

    source: a folder into which packages were unpacked, each by itself or all together, or `/`.
    inside: where a package has its languages' folders.

    Raises:
        DataError: there are none in English and another language.
    """
    found = {}
    for folder in sorted([*source.glob(f"{inside}/*"), *source.glob(f"*/{inside}/*")]):
        code = folder.name.replace("_", "-")
        if folder.is_dir() and re.fullmatch(r"[a-z]{2,3}(-\w+)*", code):
            found.setdefault(CODES.get(code, code), folder)
    if ENGLISH not in found or len(found) < 2:
        raise DataError(
            f"'{source}' does not hold {inside} in English and another language: apt-get download {packages}, and"
            " dpkg-deb -x each into a folder of it"
        )
    return {language: found[language] for language in sorted(found)}


def aligned(by_language: Mapping[str, Mapping[Place, str]], left_out: LeftOut) -> dict[Place, dict[str, str]]:
    """Returns place → language → text, of the places with an English text and one that differs from it, in English
    order; what is not translated is counted in `left_out`."""
    english = by_language[ENGLISH]
    found = {place: {ENGLISH: text} for place, text in english.items()}
    for language, texts in by_language.items():
        if language == ENGLISH:
            continue
        for place, text in texts.items():
            if place not in english:
                left_out.add("texts without the English", f"'{text[:60]}' in '{language}'")
            elif text == english[place]:
                left_out.add("texts that are not translated", f"'{text[:60]}' in '{language}'")
            else:
                found[place][language] = text
    return {place: captions for place, captions in found.items() if len(captions) > 1}


def of_pages(samples: Iterable[Sample], wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the samples whose page is wanted."""
    return (sample for sample in samples if wanted(sample.meta["page"]))


def page_samples(
    texts: Mapping[tuple[str, Any], dict[str, str]], license: str, attribution: str, left_out: LeftOut
) -> list[Sample]:
    """Returns a sample of each text by (page, place), `page` being the first one with this English text: a split by
    pages does not share a text."""
    found, seen = [], set()
    for (page, place), captions in texts.items():
        if captions[ENGLISH] in seen:
            left_out.add("texts that stand on an earlier page, too", f"'{captions[ENGLISH][:60]}'")
            continue
        seen.add(captions[ENGLISH])
        sample = text_sample(f"{page}/{place}".replace(".", "_"), captions, license, attribution)
        found.append(replace(sample, meta=sample.meta | {"page": page}))
    return found
