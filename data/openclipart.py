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
from xml.etree import ElementTree

from mug.data.captions import clean
from mug.data.errors import DataError
from mug.data.writers import Sample, key_of

INSTALLED = Path("/usr/share/openclipart")
MAX_HEAD = 2**16  # bytes of an SVG that are read; its metadata comes first
MAX_SHARED = 20  # drawings that may share a title or description; more, and it names a collection or its author
NO_TEXT = ("@", "HASH(0x")  # marks of a mail address, and of what a program left over
NO_KEYWORDS = {"hash", "unsorted"}  # left over from a program, and from sorting
DC, CC = "{http://purl.org/dc/elements/1.1/}", "{http://web.resource.org/cc/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


@dataclass(frozen=True)
class Metadata:
    """What an SVG says of itself; "" and () where it says nothing."""

    title: str = ""
    description: str = ""
    keywords: tuple[str, ...] = ()
    creator: str = ""


def find_openclipart(source: Path) -> Path:
    """The folder with `png` and `svg` in it: `source`, or in there where `dpkg -x` puts it.

    Raises:
        DataError: there is none.
    """
    for folder in (source, source / INSTALLED.relative_to("/")):
        if (folder / "png").is_dir() and (folder / "svg").is_dir():
            return folder
    raise DataError(
        f"'{source}' holds no png and svg folders: apt install openclipart-png openclipart-svg, or name the folder "
        "into which you unpacked both"
    )


def read_metadata(svg: bytes) -> Metadata:
    """What the first MAX_HEAD bytes of an SVG say; empty where they are damaged or say nothing.

    Nothing outside the file is read, and expat ends entities that would grow without bound.
    """
    parser = ElementTree.XMLPullParser(["end"])
    try:
        parser.feed(svg[:MAX_HEAD])
        work = next((element for _, element in parser.read_events() if element.tag == CC + "Work"), None)
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
    """The captions of the drawing in the file `name`, the best first.

    A title or description in `shared` says nothing of this drawing; the file's name stands in for the title.
    """
    name = re.sub(r"[\W_]+", " ", name).strip()
    title, description = (
        "" if text in shared or any(mark in text for mark in NO_TEXT) else text
        for text in (metadata.title, metadata.description)
    )
    return list(dict.fromkeys(filter(None, [title or name, description, ", ".join(metadata.keywords)])))


def openclipart_pairs(folder: Path, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """The drawings whose group is wanted, by path; `folder` is from `find_openclipart`."""
    paths = sorted((folder / "png").rglob("*.png"))
    metadata = {path: _metadata_of(folder, path) for path in paths}
    counts = Counter(text for one in metadata.values() for text in {one.title, one.description})
    shared = {text for text, count in counts.items() if count > MAX_SHARED}
    for path in paths:
        data = path.read_bytes()
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
