"""Debian's wesnoth-1.16-data: about 5,700 pictures of a game's units, in the peoples to which they belong.

Many are frames of animations, so a split goes by unit: frames of one unit, of its ranks and of both sexes, whose
names begin alike, fall on one side. They have no captions.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from mug.data.builders.drawings import Package
from mug.data.builders.writers import Sample, key_of
from mug.data.left_out import LeftOut

PACKAGE = Package(
    name="wesnoth-1.16-data",
    installed=Path("/usr/share/games/wesnoth/1.16/data/core/images"),
    inside="units",
    license="GPL-2.0-or-later",
    attribution="The Battle for Wesnoth, as packaged by Debian",
)
MIN_UNITS = 5  # of a people: fewer cannot be split


def unit_of(path: Path) -> str:
    """Returns people and unit of a picture, by its path below `units`: the name up to the first mark."""
    people, first, *_ = path.parts
    return f"{people}/{re.split(r'[-+.]', first)[0]}"


def wesnoth_unit_pairs(source: Path | None, left_out: LeftOut, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the pictures whose unit is wanted, by path; `label` is the people, `group` the unit.

    Raises:
        DataError: the package is not there.
    """
    folder = PACKAGE.find(source) / PACKAGE.inside
    paths = [path.relative_to(folder) for path in sorted(folder.glob("*/**/*.png"))]
    units = Counter(unit.partition("/")[0] for unit in {unit_of(path) for path in paths})
    for path in paths:
        unit, people = unit_of(path), path.parts[0]
        if not wanted(unit):
            continue
        if units[people] < MIN_UNITS:
            left_out.add(f"pictures of peoples with fewer than {MIN_UNITS} units", f"'{path}'")
            continue
        yield PACKAGE.pair(key_of(path), (folder / path).read_bytes(), "", group=unit, label=people)
