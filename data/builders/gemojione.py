"""Debian's ruby-gemojione: Emoji One's 1,794 drawings of 64 x 64 px, in eight categories of their index.

Another designer's drawings of the concepts that OpenMoji draws: a judge of what an encoder has learned from those.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from mug.data.builders.drawings import Package
from mug.data.builders.openmoji import group_of
from mug.data.builders.writers import Sample
from mug.data.errors import DataError
from mug.data.left_out import LeftOut

PACKAGE = Package(
    name="ruby-gemojione",
    installed=Path("/usr/share/rubygems-integration/all/gems/gemojione-3.3.0"),
    inside="config/index.json",
    license="CC BY-SA 4.0",
    attribution="Emoji One (Ranks.com Inc.), as packaged by Debian",
)
SMALL = ("modifier", "extras")  # categories of a few drawings, too few to learn from


def gemojione_pairs(source: Path | None, left_out: LeftOut, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the drawings whose concept is wanted, by code points; `label` is the category.

    `group` is the concept: all skin tones of one emoji, so that they fall on one side of a split.

    Raises:
        DataError: the package is not there, or its index is damaged.
    """
    folder = PACKAGE.find(source)
    try:
        entries = json.loads((folder / PACKAGE.inside).read_text(encoding="utf-8")).values()
        entries = sorted(entries, key=lambda entry: entry["unicode"])
        for entry in entries:
            key, group = entry["unicode"], group_of(entry["unicode"])
            if not wanted(group):
                continue
            if entry["category"] in SMALL:
                left_out.add("drawings of small categories", f"'{key}'")
                continue
            image = (folder / "assets" / "png" / f"{key}.png").read_bytes()
            meta = {"group": group, "label": entry["category"], "keywords": entry["keywords"]}
            yield PACKAGE.pair(key, image, entry["name"], **meta)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{folder}' cannot be read ({error}): apt install --reinstall {PACKAGE.name}") from error
