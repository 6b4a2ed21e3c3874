"""Debian's wesnoth-1.16-data without its units: about 6,000 pictures of terrain, items, attacks, scenes and people.

Captions are the files' names. Those that name one of the peoples of `wesnoth_units` are left out: encoders are judged
on these.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mug.data.builders.drawings import named_pairs
from mug.data.builders.wesnoth_units import PACKAGE
from mug.data.builders.writers import Sample
from mug.data.left_out import LeftOut

FOLDERS = ("attacks", "flags", "halo", "icons", "items", "portraits", "projectiles", "scenery", "terrain")
PEOPLES = re.compile(
    "drake|dune|dwar|elf|elv|goblin|loyal|mage|outlaw|peasant|merm|merf|monster|naga|ogre|orc|saurian|troll|undead"
    "|necro|skele|wose|human"
)


def wesnoth_picture_pairs(source: Path | None, left_out: LeftOut, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the pictures whose caption is wanted, by path; see `named_pairs`.

    Raises:
        DataError: the package is not there.
    """
    folder, paths = PACKAGE.find(source), []
    for path in (path for inside in FOLDERS for path in sorted((folder / inside).rglob("*.png"))):
        if PEOPLES.search(path.stem.lower()):
            left_out.add("pictures named after a people", f"'{path.relative_to(folder)}'")
        elif not path.is_symlink():
            paths.append(path)
    return named_pairs(PACKAGE, folder, paths, wanted)
