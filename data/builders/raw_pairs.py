"""Images with captions that are not shards yet, from a folder of files or from Parquet, prepared for shards."""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image, ImageOps

from mug.data.builders.own_keys import OwnKeys
from mug.data.builders.pair_files import pair_files
from mug.data.builders.writers import Sample, encoded, key_of
from mug.data.captions import TEXT_LANGUAGE, clean, decode, in_json, texts
from mug.data.decode import MAX_PIXELS
from mug.data.errors import BadSample, DataError, printable
from mug.data.index.columnar import find_columns, shown_columns
from mug.data.left_out import LeftOut

# Of Pillow's formats; MPO is a JPEG with further pictures in it.
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
JPEG_QUALITY = 95  # as img2dataset's
PARQUET_ROWS = 100  # read at a time

log = logging.getLogger("mug")


def folder_pairs(
    folder: Path, caption: str | None, left_out: LeftOut, wanted: Callable[[str], bool]
) -> Iterator[Sample]:
    """Yields the images below `folder` whose key is wanted, by path, with the text and .json of the same name.

    `caption` as in `pair_files`. The json of a pair is that of the file, with the image's folder as `label` where the
    file gives none. A key that comes twice gets a number. What is not an image, belongs to none or cannot be read is
    counted in `left_out` where its key is wanted.

    Raises:
        DataError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise DataError(f"'{folder}' is not a folder: give one that holds images")
    keys = OwnKeys()
    for files in pair_files(folder, caption, left_out, lambda inside: wanted(printable(key_of(inside)))):
        inside = files.image.relative_to(folder)
        key = printable(key_of(inside))
        own_key = keys.own(key, files.image)
        if not wanted(key):
            continue
        try:
            meta = _object(_read(files.json), files.image)
            label = {"label": printable(inside.parent.as_posix())} if inside.parent.parts else {}
            yield _pair(own_key, files.image.read_bytes(), _read(files.text), label | meta)
        except OSError as error:
            left_out.add("files that cannot be read", f"'{error.filename}': {error.strerror}")


def parquet_pairs(source: Path, caption: str | None, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the rows whose key is wanted, of a Parquet file or of all in a folder; `caption` names their column.

    A row without a key has its number for one; a key that comes twice gets a number. The json of a pair is that of
    the row, with the values of all other columns that JSON can hold.

    Raises:
        DataError: the file does not exist, is damaged, or lacks a column of images, or `caption`.
    """
    keys = OwnKeys()
    for number, (row, columns) in enumerate(_rows(source, caption)):
        key = _row_key(row.get(columns.get("key")), number)
        own_key = keys.own(key, f"row {number}")
        if wanted(key):
            yield _row_pair(own_key, row, columns)


def _row_key(value: object, number: int) -> str:
    """Returns a key that can be a file's name in a tar."""
    value = value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value or "")
    return value.replace(".", "_").replace("\0", "_").strip("/") or f"{number:09d}"


def seen_in_parquet(source: Path) -> str:
    """Returns the columns of a Parquet file, or of the first in a folder, for a message."""
    return shown_columns(pyarrow.parquet.read_schema(_parquet_files(source)[0]))


def _parquet_files(source: Path) -> list[Path]:
    paths = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not paths or not paths[0].is_file():
        raise DataError(f"'{source}' is not a Parquet file, nor a folder that holds some")
    return paths


def _rows(source: Path, caption: str | None) -> Iterator[tuple[dict, dict[str, str]]]:
    """Yields each row, and part → name of its column."""
    for path in _parquet_files(source):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                columns = find_columns(file.schema_arrow, caption)
                for batch in file.iter_batches(PARQUET_ROWS):
                    values = [_values(batch[name]) for name in batch.schema.names]
                    for row in zip(*values, strict=True):
                        yield dict(zip(batch.schema.names, row, strict=True)), columns
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"'{path}' cannot be read: {str(error).splitlines()[0]}") from error
        except DataError as error:
            raise DataError(f"'{path}' {error}") from error


def _values(column: pyarrow.Array) -> list[object]:
    """Returns the values as Python's; text as bytes, which need not be valid; None for what Python cannot hold."""
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        return [None if value is None else decode(value) for value in column.cast(pyarrow.large_binary()).to_pylist()]
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, pyarrow.ArrowException):  # one text that is not UTF-8, one date too late
        return [_value(one) for one in column]


def _value(one: pyarrow.Scalar) -> object:
    try:
        return one.as_py()
    except (ValueError, OverflowError, pyarrow.ArrowException):
        return None


def _row_pair(key: str, row: dict, columns: dict[str, str]) -> Sample:
    values = {part: row[name] for part, name in columns.items()}  # one column may be two parts: key and caption
    row = {name: value for name, value in row.items() if name not in columns.values()}
    image, json_value = values["image"], values.get("json") or row.pop("json", None)
    image = image.get("bytes") if isinstance(image, dict) else image  # as Hugging Face datasets hold one
    meta = {name: value for name, value in row.items() if _fits_json(value)} | _object(json_value, key)
    return _pair(key, image if isinstance(image, bytes) else b"", values.get("text"), meta)


def _fits_json(value: object) -> bool:
    if isinstance(value, list):
        return all(_fits_json(one) for one in value)
    if isinstance(value, dict):
        return all(isinstance(name, str) and (one is None or _fits_json(one)) for name, one in value.items())
    return isinstance(value, str | int | float) and value == value  # NaN is not itself


def _pair(key: str, image: bytes, text: object, meta: dict) -> Sample:
    """`text`: a caption or several, as bytes or in any type of `texts`; the json's stands in where there is none."""
    captions = [caption for caption in map(clean, texts(text)) if caption] or in_json(meta)
    if len(captions) > 1:
        by_language = meta.get("captions")
        meta["captions"] = {TEXT_LANGUAGE: captions} | (by_language if isinstance(by_language, dict) else {})
    first = captions[0] if captions else ""
    return Sample(key, image, "", first, meta | {"key": key, "caption": first})


def _read(path: Path | None) -> bytes:
    return path.read_bytes() if path else b""


def _object(value: Any, owner: object) -> dict:
    """Returns the object in a json, or the json of a column; {}, with a warning, where there is none in it."""
    if isinstance(value, dict):
        return {name: one for name, one in value.items() if _fits_json(one)}
    try:
        meta = json.loads(decode(value) if isinstance(value, bytes) else value or "{}") if value else {}
    except (ValueError, TypeError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        log.warning("%s: its json does not hold an object and is left out", printable(str(owner)))
        return {}
    return meta


def prepared(pairs: Iterable[Sample], image_size: int | None, left_out: LeftOut) -> Iterator[Sample]:
    """Yields the pairs as shards take them; those without a valid image are counted in `left_out`.

    An image keeps its bytes, unless `image_size` is given and its longer side is greater. Texts stay as they are.
    """
    for pair in pairs:
        try:
            yield pair if pair.extension is None else prepare(pair, image_size)
        except BadSample as error:
            left_out.add("images that cannot be used", f"'{pair.key}': {error}")


def prepare(pair: Sample, image_size: int | None) -> Sample:
    """Returns the pair with its image's true extension, and `width` and `height` in the json.

    Raises:
        BadSample: training does not read such an image.
    """
    if not pair.image:
        raise BadSample("it has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the project's own bound is lower
            image = Image.open(io.BytesIO(pair.image), formats=FORMATS)
        width, height = image.size
        data, extension = pair.image, EXTENSIONS[str(image.format)]
        if width * height > MAX_PIXELS:
            raise BadSample(f"{width}x{height} is more than {MAX_PIXELS:,} pixels")
        if image_size and max(image.size) > image_size:
            image = ImageOps.contain(_upright_rgb(image), (image_size, image_size), Image.Resampling.BICUBIC)
            data, extension = encoded(image, "JPEG", quality=JPEG_QUALITY), "jpg"
    except BadSample:
        raise
    except Exception as error:  # on damaged bytes PIL raises a dozen kinds
        unknown = isinstance(error, Image.UnidentifiedImageError)
        raise BadSample("not PNG, JPEG, WebP, GIF, BMP or TIFF" if unknown else repr(error)) from error
    meta = pair.meta | {"width": image.width, "height": image.height}
    return replace(pair, image=data, extension=extension, meta=meta)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Returns the image as RGB, turned by its EXIF, transparent parts on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
