"""Images with captions that are no shards yet, from a folder of files or from Parquet; and what shards take of them."""

import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image, ImageOps

from mug.data.captions import clean
from mug.data.decode import MAX_PIXELS
from mug.data.errors import BadSample, DataError
from mug.data.writers import Sample, key_of

EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}  # MPO: a JPEG with further pictures in it
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# part → names of its column in a Parquet file, the first that is there being read
COLUMNS = {
    "key": ("key", "__key__"),
    "image": ("jpg", "jpeg", "png", "webp", "image"),
    "caption": ("txt", "caption", "text"),
    "json": ("json",),
}
JPEG_QUALITY = 95  # as img2dataset's
PARQUET_ROWS = 100  # read at a time

log = logging.getLogger("mug")


def folder_pairs(folder: Path, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """The images below `folder` whose key is wanted, by path, with the .txt and .json of the same name.

    The json of a pair is that of the file, with the image's folder as `label` where the file gives none.

    Raises:
        DataError: `folder` is none.
    """
    if not folder.is_dir():
        raise DataError(f"'{folder}' is no folder: name one that holds images")
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for path in (Path(parent, name) for name in sorted(names)):
            inside = path.relative_to(folder)
            if path.suffix.lower() in SUFFIXES and wanted(key_of(inside)):
                meta = _object(_read(path.with_suffix(".json")), path)
                label = {"label": inside.parent.as_posix()} if inside.parent.parts else {}
                yield _pair(key_of(inside), path.read_bytes(), _read(path.with_suffix(".txt")), label | meta)


def parquet_pairs(source: Path, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """The rows whose key is wanted, of a Parquet file or of all in a folder.

    A row without a key has its number for one. The json of a pair is that of the row, with the values of all other
    columns that JSON can hold.

    Raises:
        DataError: there is no such file, it is damaged, or lacks a column of images.
    """
    for number, (row, columns) in enumerate(_rows(source)):
        key = str(row.get(columns.get("key")) or f"{number:09d}").replace(".", "_")
        if wanted(key):
            yield _row_pair(key, row, columns)


def _rows(source: Path) -> Iterator[tuple[dict, dict[str, str]]]:
    """Each row, and part → name of its column."""
    paths = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not paths or not paths[0].is_file():
        raise DataError(f"'{source}' is no Parquet file, nor a folder that holds some")
    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                columns = _find_columns(path, file.schema_arrow)
                for batch in file.iter_batches(PARQUET_ROWS):
                    yield from ((row, columns) for row in batch.to_pylist())
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"'{path}' cannot be read: {str(error).splitlines()[0]}") from error


def _find_columns(path: Path, schema: pyarrow.Schema) -> dict[str, str]:
    """part → name of its column."""
    found = {part: next((n for n in names if n in schema.names), None) for part, names in COLUMNS.items()}
    if found["image"] is None:
        raise DataError(f"'{path}' has no column of images: name it one of {', '.join(COLUMNS['image'])}")
    return {part: name for part, name in found.items() if name}


def _row_pair(key: str, row: dict, columns: dict[str, str]) -> Sample:
    values = {part: row.pop(name) for part, name in columns.items()}
    image = values["image"]
    image = image.get("bytes") if isinstance(image, dict) else image  # as Hugging Face datasets hold one
    meta = {name: value for name, value in row.items() if _fits_json(value)}
    meta |= _object(values.get("json") or b"", key)
    return _pair(key, image if isinstance(image, bytes) else b"", values.get("caption") or b"", meta)


def _fits_json(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(one, str | int | float) and one == one for one in values)  # NaN is not itself


def _pair(key: str, image: bytes, text: str | bytes, meta: dict) -> Sample:
    caption = clean(text) or clean(meta["caption"] if isinstance(meta.get("caption"), str) else "")
    return Sample(key, image, "", caption, meta | {"key": key, "caption": caption})


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _object(text: str | bytes, owner: object) -> dict:
    """The object in a json; {}, with a warning, where there is none in it."""
    try:
        meta = json.loads(text or "{}")
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        log.warning("%s: its json holds no object and is left aside", owner)
        return {}
    return meta


@dataclass
class LeftOut:
    """How many pairs were left out, and why the first."""

    count: int = 0
    first: str = ""


def prepared(pairs: Iterable[Sample], image_size: int | None, left_out: LeftOut) -> Iterator[Sample]:
    """The pairs as shards take them; those whose image is none are counted in `left_out`.

    An image keeps its bytes, unless `image_size` is given and its longer side is greater.
    """
    for pair in pairs:
        try:
            yield prepare(pair, image_size)
        except BadSample as error:
            left_out.count += 1
            left_out.first = left_out.first or f"'{pair.key}': {error}"


def prepare(pair: Sample, image_size: int | None) -> Sample:
    """The pair with its image's true extension, and `width` and `height` in the json.

    Raises:
        BadSample: the image is none that training reads.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is below
            image = Image.open(io.BytesIO(pair.image), formats=("PNG", "JPEG", "WEBP"))
        width, height = image.size
        data, extension = pair.image, EXTENSIONS[image.format]
        if width * height > MAX_PIXELS:
            raise BadSample(f"{width}x{height} is more than {MAX_PIXELS:,} pixels")
        if image_size and max(image.size) > image_size:
            image = ImageOps.contain(_upright_rgb(image), (image_size, image_size), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=JPEG_QUALITY)
            data, extension = buffer.getvalue(), "jpg"
    except BadSample:
        raise
    except Exception as error:  # on damaged bytes PIL raises a dozen kinds
        unknown = isinstance(error, Image.UnidentifiedImageError)
        raise BadSample("not PNG, JPEG or WebP" if unknown else repr(error)) from error
    meta = pair.meta | {"width": image.width, "height": image.height}
    return replace(pair, image=data, extension=extension, meta=meta)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """RGB, turned as its EXIF says, transparent parts on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
