"""Multi30k (arXiv 1605.00459): Flickr30k's images with captions in English, German, French and Czech, by its splits.

A folder with the images, and of one task of the data set's repository the lists `image_splits/SPLIT.txt` (task 1) or
`SPLIT_images.txt` (task 2), an image's name a line, and the texts, a line each: `raw/SPLIT.LANGUAGE` (task 1, one
translation of an image) or `raw/SPLIT.N.LANGUAGE` (task 2, five captions of an image), as they are or with .gz.
"""

import gzip
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mug.data.builders.image_files import is_image, walk
from mug.data.builders.writers import Sample, key_of
from mug.data.captions import TEXT_LANGUAGE, clean
from mug.data.errors import DataError
from mug.data.left_out import LeftOut

LICENCE = "texts: CC BY-NC-SA 4.0; images: those of Flickr's users, for research"
ATTRIBUTION = "Multi30k (Elliott et al., 2016), on Flickr30k (Young et al., 2014)"
LISTS = "image_splits"
TRAIN = "train"


def multi30k_splits(source: Path) -> list[str]:
    """Returns the names of the splits that have a list, that of training first.

    Raises:
        DataError: there are no lists, or those of two tasks.
    """
    return sorted(_lists(_files(source)), key=lambda split: (split != TRAIN, split))


def multi30k_pairs(source: Path, left_out: LeftOut, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the images of the splits that are wanted, asked as `SPLIT/`, in the order of the lists, with `captions` in
    each language; the key is SPLIT/LINE_NAME. Images that are not there are counted in `left_out`.

    Raises:
        DataError: a list and a text differ in their lines, or see `multi30k_splits`.
    """
    files = _files(source)
    images = {path.name: path for path in files if is_image(path.name)}
    for split, path in _lists(files).items():
        if not wanted(f"{split}/"):
            continue
        names = [line.partition("#")[0] for line in _lines(path)]  # COCO's have the number of a caption behind
        texts = _texts(files, split, path, len(names))
        if not texts:
            left_out.add("lists without a text", f"'{path}'")
        for number, name in enumerate(names if texts else ()):
            if name not in images:
                left_out.add("images that are not there", f"'{name}' of '{path}'")
                continue
            found = {language: [some[number] for some in many if some[number]] for language, many in texts.items()}
            captions = {language: some for language, some in found.items() if some}
            first = captions.get(TEXT_LANGUAGE, [""])[0]
            key = f"{split}/{number + 1:05d}_{key_of(Path(name))}"
            meta = {"key": key, "caption": first, "captions": captions}
            meta |= {"license": LICENCE, "attribution": ATTRIBUTION}
            yield Sample(key, images[name].read_bytes(), "", first, meta)


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        raise DataError(f"'{source}' is not a folder: give one with Multi30k's images, {LISTS}/ and raw/")
    return [folder / name for folder, names in walk(source, lambda kind, path: None) for name in names]


def _lists(files: list[Path]) -> dict[str, Path]:
    """Returns split → its list of images."""
    found: dict[str, Path] = {}
    for path in sorted(files):
        if path.parent.name == LISTS and path.suffix == ".txt":
            split = path.stem.removesuffix("_images")
            if split in found:
                raise DataError(f"'{found[split]}' and '{path}' are of one split: give the folder of one task")
            found[split] = path
    if not found:
        raise DataError(f"no {LISTS}/*.txt: give a folder with Multi30k's images, {LISTS}/ and raw/")
    return found


def _texts(files: list[Path], split: str, listed: Path, count: int) -> dict[str, list[list[str]]]:
    """Returns language → the lines of each of its files, in the order of their numbers."""
    named = re.compile(rf"{re.escape(split)}(?:\.\d+)?\.([a-z]{{2,3}})(?:\.gz)?")
    found: dict[str, list[list[str]]] = {}
    for path in sorted(files, key=lambda path: path.name):
        match = named.fullmatch(path.name)
        if match is None or match[1] in ("txt", "gz"):
            continue
        lines = _lines(path)
        if len(lines) != count:
            raise DataError(f"'{path}' has {len(lines):,} lines, but '{listed}' {count:,}: fetch them again")
        found.setdefault(match[1], []).append(lines)
    return found


def _lines(path: Path) -> list[str]:
    """Returns the lines, cleaned; only a line feed ends one."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode(errors="replace")
    except (OSError, EOFError) as error:
        raise DataError(f"'{path}' cannot be read ({error}): fetch it again") from error
    return [clean(line) for line in text.removesuffix("\n").split("\n")]
