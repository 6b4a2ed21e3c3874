"""Drawings that packages install, as image-text pairs: where they lie, their names as captions, SVGs as PNGs."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mug.data.builders.writers import Sample, key_of
from mug.data.errors import DataError

SIZE = 64  # pixels, of SVGs


@dataclass(frozen=True)
class Package:
    """A Debian package of drawings. inside: a folder of its `installed` one that must exist."""

    name: str
    installed: Path
    inside: str
    license: str
    attribution: str

    def find(self, source: Path | None) -> Path:
        """Returns the folder of the drawings: `source`, in there where `dpkg -x` puts it, or where apt installs it.

        Raises:
            DataError: there is none.
        """
        where = [self.installed] if source is None else [source, source / self.installed.relative_to("/")]
        for folder in where:
            if (folder / self.inside).exists():
                return folder
        raise DataError(
            f"'{source or self.installed}' does not hold {self.inside}: apt install {self.name}, or give the folder"
            " into which you unpacked it"
        )

    def pair(self, key: str, image: bytes, caption: str, **meta: object) -> Sample:
        """Returns a drawing as a pair."""
        meta |= {"key": key, "caption": caption, "license": self.license}
        return Sample(key, image, "png", caption, meta | {"attribution": self.attribution})


def words(name: str) -> str:
    """Returns a file's name as a caption: words, without a number at its end."""
    return re.sub(r"[\W_]+", " ", name).strip().rstrip("0123456789").strip()


def draw(svg: Path, size: int = SIZE) -> bytes:
    """Returns an SVG as a PNG of size x size on white; nothing outside the file is read."""
    return rasterized(svg.read_text(encoding="utf-8"), size, size)


def rasterized(svg: str, width: int, height: int) -> bytes:
    """Returns an SVG as a PNG on white."""
    import resvg_py

    options = {"background": "white", "skip_system_fonts": True, "width": width, "height": height}
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, **options))


def named_pairs(
    package: Package, folder: Path, paths: Iterable[Path], wanted: Callable[[str], bool]
) -> Iterator[Sample]:
    """Yields the drawings below `folder` whose caption is wanted, captioned by their files' names.

    `group` is the caption, so that drawings of one name fall on one side of a split; `label` is the folder's name.
    A name without a letter is not a caption: such a drawing has none.
    """
    for path in paths:
        group = words(path.stem)
        if wanted(group):
            image = draw(path) if path.suffix == ".svg" else path.read_bytes()
            caption = group if re.search(r"[^\W\d]", group) else ""
            yield package.pair(key_of(path.relative_to(folder)), image, caption, group=group, label=path.parent.name)
