"""Statements about OpenMoji's drawings, true, false or unsure, in more than 100 languages: a stand-in of XVNLI.

A statement is a keyword that Unicode's CLDR gives a drawing, in the words of its translators: `true` is one of the
drawing's own, `unsure` one of a sibling in its subgroup of Unicode's emoji list (npm package emoji.json), which may fit
or not, `false` one of another subgroup. In another language it is a keyword of the same drawing as in English, not its
translation. A word of the drawing's own is never false or unsure, one of its siblings' never false.

The three are equally many, and all of a split's words are of drawings of this split. Of an emoji's variants (skin
tones) only the first is taken. The same packages, the same bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mug.data.builders.cldr import read_cldr
from mug.data.builders.npm_files import npm_files
from mug.data.builders.openmoji import drawn
from mug.data.builders.writers import Sample
from mug.data.errors import DataError
from mug.data.left_out import LeftOut

PACKAGE = "emoji.json"  # Unicode's emoji list, MIT
ROUNDS = 3  # max statements of each kind about a drawing

Metas = dict[str, dict]  # key of a drawing → its json as of mug.data.builders.cldr, with `subgroup` and `words`
Words = dict[str, list[str]]  # by language
Known = dict[str, set[str]]  # language → words, in lower case


def read_drawings(source: Path, left_out: LeftOut) -> Metas:
    """Returns the drawings that statements can be about, in the order of their code points.

    source: a folder with the npm packages.

    Raises:
        DataError: a package is missing or damaged.
    """
    subgroups, metas, groups = _subgroups(source), {}, set()
    for key, meta in read_cldr(source, left_out).items():
        subgroup = subgroups.get(key.replace("-FE0F", ""))
        if meta["group"] in groups:
            left_out.add("further variants of an emoji", f"'{key}'")
        elif subgroup is None or "en" not in meta["keywords"]:
            left_out.add("drawings without a subgroup or keywords", f"'{key}'")
        else:
            groups.add(meta["group"])
            metas[key] = meta | {"subgroup": subgroup}
    return metas


def _subgroups(source: Path) -> dict[str, str]:
    """Returns code points without FE0F → subgroup of an emoji."""
    ((name, data),) = npm_files(source, PACKAGE, "emoji.json")
    try:
        return {one["codes"].replace(" ", "-").replace("-FE0F", ""): one["subgroup"] for one in json.loads(data)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name} of npm package {PACKAGE} is damaged ({error!r}): fetch it again") from error


def statement_samples(metas: Metas, left_out: LeftOut, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the statements about those drawings whose group is wanted."""
    mine = {key: meta for key, meta in metas.items() if wanted(meta["group"])}
    subgroups: dict[str, list[str]] = {}
    for key, meta in mine.items():
        subgroups.setdefault(meta["subgroup"], []).append(key)
    known = {name: _known(mine[key] for key in keys) for name, keys in subgroups.items()}
    for sample in drawn(mine):
        subgroup = sample.meta["subgroup"]
        siblings = [key for key in subgroups[subgroup] if key != sample.key]
        others = [key for key in mine if mine[key]["subgroup"] != subgroup]
        own = _known([sample.meta])
        found = {
            "true": _taken(sample.key, [sample.key] * ROUNDS, mine, {}),
            "unsure": _taken(sample.key, siblings, mine, own),
            "false": _taken(sample.key, others, mine, known[subgroup]),
        }
        count = min(map(len, found.values()))
        if not count:
            left_out.add("drawings without statements of each kind", f"'{sample.key}'")
        for label, statements in found.items():
            yield from (_sample(sample, label, i, texts) for i, texts in enumerate(statements[:count]))


def _known(metas: Iterable[dict]) -> Known:
    """Returns all names and keywords of drawings, by language."""
    found: Known = {}
    for meta in metas:
        for language, words in meta["keywords"].items():
            found.setdefault(language, set()).update(word.casefold() for word in words)
        for language, name in meta["captions"].items():
            found.setdefault(language, set()).add(name.casefold())
    return found


def _taken(key: str, sources: list[str], metas: Metas, excluded: Known) -> list[dict[str, str]]:
    """Returns up to ROUNDS statements about the drawing `key`, each in the languages that have one: words of one of
    `sources`, whose order the key shuffles, that are not excluded, no two the same in English."""
    found: list[dict[str, str]] = []

    def usable(source: str, language: str) -> list[str]:
        out = excluded.get(language, set())
        return _shuffled([word for word in metas[source]["keywords"][language] if word.casefold() not in out], key)

    for source in _shuffled(sources, key):
        english = next((word for word in usable(source, "en") if word not in {texts["en"] for texts in found}), None)
        if english is None:
            continue
        words = {language: usable(source, language) for language in metas[source]["keywords"]}
        found.append({one: some[len(found) % len(some)] for one, some in words.items() if some} | {"en": english})
        if len(found) == ROUNDS:
            break
    return found


def _shuffled(values: list[str], key: str) -> list[str]:
    """Returns the values in an order that the key alone decides."""
    return sorted(values, key=lambda value: hashlib.sha256(f"{key} {value}".encode()).digest())


def _sample(drawing: Sample, label: str, number: int, captions: dict[str, str]) -> Sample:
    key = f"{drawing.key}-{label}-{number}"
    kept = {name: drawing.meta[name] for name in ("group", "width", "height", "license", "attribution")}
    meta = {"key": key, "label": label, "image": drawing.key, "captions": captions, "caption": captions["en"], **kept}
    return Sample(key, drawing.image, drawing.extension, captions["en"], meta)
