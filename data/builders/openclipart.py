"""Debian's Open Clip Art Library: 8,121 drawings in the public domain, as image-text pairs.

The packages `openclipart-png` and `openclipart-svg` hold the same tree of folders. An SVG's metadata (Dublin Core in
RDF) gives the drawing a title, a description and keywords. A fifth of the PNGs are links to, or copies of, others:
`group` in the json names the picture itself, and the split goes by it.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mug.data.builders.writers import Sample, key_of
from mug.data.captions import clean
from mug.data.errors import DataError
from mug.data.left_out import LeftOut

INSTALLED = Path("/usr/share/openclipart")
MAX_HEAD = 2**16  # bytes of an SVG that are read; its metadata comes first
MAX_SHARED = 20  # drawings that may share a title or description; more, and it names a collection or its author
NO_TEXT = ("@", "HASH(0x")  # marks of a mail address, and of what a program left over
NO_KEYWORDS = {"hash", "unsorted"}  # left over from a program, and from sorting
DC, CC = "{http://purl.org/dc/elements/1.1/}", "{http://web.resource.org/cc/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


@dataclass(frozen=True)
class Metadata:
    """The metadata of an SVG; "" and () where it has none."""

    title: str = ""
    description: str = ""
    keywords: tuple[str, ...] = ()
    creator: str = ""


def find_openclipart(source: Path) -> Path:
    """Returns the folder with `png` and `svg` in it: `source`, or in there where `dpkg -x` puts it.

    Raises:
        DataError: there is none.
    """
    for folder in (source, source / INSTALLED.relative_to("/")):
        if (folder / "png").is_dir() and (folder / "svg").is_dir():
            return folder
    raise DataError(
        f"'{source}' does not hold png and svg folders: apt install openclipart-png openclipart-svg, or the folder "
        "into which you unpacked both"
    )


def read_metadata(svg: bytes) -> Metadata:
    """Returns the metadata in the first MAX_HEAD bytes of an SVG; empty where they are damaged or hold none.

    Nothing outside the file is read, and expat ends entities that would grow without bound.
    """
    parser = ElementTree.XMLPullParser(["end"])
    try:
        parser.feed(svg[:MAX_HEAD])
        events: Iterator[Any] = parser.read_events()
        work = next((element for _, element in events if element.tag == CC + "Work"), None)
    except (ElementTree.ParseError, ValueError, LookupError):  # the last two: an encoding that is not known
        work = None
    if work is None:
        return Metadata()
    keywords = (clean(item.text or "").replace("_", " ") for item in work.iterfind(f"{DC}subject/{RDF}Bag/{RDF}li"))
    return Metadata(
        title=clean(work.findtext(DC + "title") or ""),
        description=clean(work.findtext(DC + "description") or ""),
        keywords=tuple(dict.fromkeys(word for word in keywords if word and word.lower() not in NO_KEYWORDS)),
        creator=clean(work.findtext(f"{DC}creator/{CC}Agent/{DC}title") or ""),
    )


def captions_of(name: str, metadata: Metadata, shared: set[str]) -> list[str]:
    """Returns the captions of the drawing in the file `name`, the best first.

    A title or description in `shared` does not describe this drawing; the file's name stands in for the title.
    """
    name = re.sub(r"[\W_]+", " ", name).strip()
    title, description = (
        "" if text in shared or any(mark in text for mark in NO_TEXT) else text
        for text in (metadata.title, metadata.description)
    )
    return list(dict.fromkeys(filter(None, [title or name, description, ", ".join(metadata.keywords)])))


def openclipart_pairs(folder: Path, left_out: LeftOut, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the drawings whose group is wanted, by path; `folder` is from `find_openclipart`.

    Those that cannot be read are counted in `left_out` where their name is wanted.
    """
    paths = sorted((folder / "png").rglob("*.png"))
    metadata = {path: _metadata_of(folder, path) for path in paths}
    counts = Counter(text for one in metadata.values() for text in {one.title, one.description})
    shared = {text for text, count in counts.items() if count > MAX_SHARED}
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:  # a link to a drawing that is not unpacked, for one
            if wanted(path.name):
                left_out.add("files that cannot be read", f"'{path}': {error.strerror}")
            continue
        group = hashlib.sha256(data).hexdigest()[:16]
        if wanted(group):
            yield _sample(path.relative_to(folder / "png"), data, group, metadata[path], shared)


def _metadata_of(folder: Path, png: Path) -> Metadata:
    svg = folder / "svg" / png.relative_to(folder / "png").with_suffix(".svg")
    if not svg.is_file():
        return Metadata()
    with open(svg, "rb") as file:
        return read_metadata(file.read(MAX_HEAD))


def _sample(path: Path, data: bytes, group: str, metadata: Metadata, shared: set[str]) -> Sample:
    captions = captions_of(path.stem, metadata, shared)
    meta = {
        "key": key_of(path),
        "caption": captions[0],
        "captions": {"en": captions},
        "keywords": list(metadata.keywords),
        "creator": metadata.creator,
        "category": path.parent.as_posix(),
        "label": path.parts[0],
        "group": group,
        "license": "public domain",
        "attribution": "Open Clip Art Library, as packaged by Debian",
    }
    return Sample(meta["key"], data, "png", captions[0], meta)
