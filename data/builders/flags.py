"""Flags of countries and territories with the names that Unicode's CLDR gives these in about 200 languages.

Drawings of npm package flag-icons, names of cldr-localenames-full: `npm pack` both into one folder.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from mug.data.builders.drawings import rasterized
from mug.data.builders.npm_files import npm_files
from mug.data.builders.writers import Sample
from mug.data.errors import DataError
from mug.data.left_out import LeftOut

LICENCE = "MIT; names: Unicode-3.0"
ATTRIBUTION = "flag-icons (npm), Panayiotis Lipiridis; names: Unicode CLDR"
DRAWINGS, NAMES = "flag-icons", "cldr-localenames-full"
WIDTH, HEIGHT = 128, 96


def flag_pairs(flags: dict[str, tuple[str, dict]], wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields those of the flags whose key is wanted."""
    for key, (svg, meta) in flags.items():
        if wanted(key):
            yield Sample(key, rasterized(svg, WIDTH, HEIGHT), "png", meta["caption"], meta)


def read_flags(source: Path, left_out: LeftOut) -> dict[str, tuple[str, dict]]:
    """Returns key, the code of the territory → SVG and json, whose `captions` has its names by locale.

    source: a folder with the npm packages.

    Raises:
        DataError: a package is missing or damaged.
    """
    by_locale, found = territory_names(source), {}
    for name, svg in npm_files(source, DRAWINGS, "flags/4x3/*.svg"):
        key = PurePosixPath(name).stem
        captions = {locale: names[key.upper()] for locale, names in by_locale.items() if key.upper() in names}
        if "en" not in captions:
            left_out.add("flags without a name in CLDR", f"'{key}'")
        else:
            meta = {"key": key, "caption": captions["en"], "captions": captions, "group": key}
            meta |= {"width": WIDTH, "height": HEIGHT, "license": LICENCE, "attribution": ATTRIBUTION}
            found[key] = svg.decode("utf-8", errors="replace"), meta
    return found


def territory_names(source: Path) -> dict[str, dict[str, str]]:
    """Returns locale → code → name; a name that is the code itself is none.

    Raises:
        DataError: the package is missing or damaged.
    """
    found = {}
    for name, data in npm_files(source, NAMES, "main/*/territories.json"):
        locale = name.split("/")[1]
        try:
            names = json.loads(data)["main"][locale]["localeDisplayNames"]["territories"]
            found[locale] = {code: text for code, text in names.items() if text != code}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{name} of npm package {NAMES} is damaged ({error!r}): fetch it again") from error
    return found
