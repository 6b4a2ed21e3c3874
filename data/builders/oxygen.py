"""Debian's Oxygen icons: about 1,200 shaded drawings of KDE, named by what they stand for ("address book new")."""

from collections.abc import Callable, Iterator
from pathlib import Path

from mug.data.builders.drawings import Package, named_pairs
from mug.data.builders.writers import Sample

PACKAGE = Package(
    name="oxygen-icon-theme",
    installed=Path("/usr/share/icons/oxygen"),
    inside="base/64x64",
    license="LGPL-3.0-or-later",
    attribution="Oxygen Icons, KDE, as packaged by Debian",
)
SIZES = ("64x64", "48x48")  # not all are drawn in each; the first is taken


def oxygen_pairs(source: Path | None, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the icons whose name is wanted, each in its largest size; see `named_pairs`.

    Raises:
        DataError: the package is not there.
    """
    folder = PACKAGE.find(source)
    found: dict[str, Path] = {}
    for size in SIZES:
        for path in sorted((folder / "base" / size).glob("*/*.png")):
            if not path.is_symlink():
                found.setdefault(f"{path.parent.name}/{path.stem}", path)
    return named_pairs(PACKAGE, folder / "base", found.values(), wanted)
