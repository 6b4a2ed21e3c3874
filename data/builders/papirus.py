"""Debian's Papirus icons: about 3,600 flat drawings of applications, named after them."""

from collections.abc import Callable, Iterator
from pathlib import Path

from mug.data.builders.drawings import Package, named_pairs
from mug.data.builders.writers import Sample

PACKAGE = Package(
    name="papirus-icon-theme",
    installed=Path("/usr/share/icons/Papirus"),
    inside="64x64/apps",
    license="GPL-3.0",
    attribution="Papirus Development Team, as packaged by Debian",
)


def papirus_pairs(source: Path | None, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the icons of applications whose name is wanted, links to others left out; see `named_pairs`.

    Raises:
        DataError: the package is not there.
    """
    folder = PACKAGE.find(source)
    paths = sorted(path for path in (folder / PACKAGE.inside).glob("*.svg") if not path.is_symlink())
    return named_pairs(PACKAGE, folder, paths, wanted)
