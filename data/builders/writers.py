"""Samples → shards on disk: tar as img2dataset lays it out, Arrow IPC or Parquet. The same samples, the same bytes.

A sample in a tar is KEY.png (or .jpg, …), KEY.txt and KEY.json. In a table it is a row of `key`, `image`, `caption`
and `json`, which hold the same bytes; a table of texts has no column `image`. Next to each shard, NNNNN_stats.json
counts its samples.
"""

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet
from PIL import Image

from mug.data.errors import DataError

SCHEMA = pyarrow.schema(
    [("key", pyarrow.string()), ("image", pyarrow.binary()), ("caption", pyarrow.string()), ("json", pyarrow.string())]
)
ARROW_ROWS = 1000  # of a record batch
PARQUET_ROWS = 100  # of a row group: reading one sample decodes all of its group
BATCH_BYTES = 64 * 2**20  # after which a batch ends early: memory, and the 2 GB that its offsets reach


@dataclass(frozen=True)
class Sample:
    """An image with its caption ("": none) and what its json is to hold.

    extension: of the image, lower case and without the dot; None for a text without an image, as all of its shard are.
    """

    key: str
    image: bytes
    extension: str | None
    caption: str
    meta: dict

    @property
    def json(self) -> bytes:
        return json.dumps(self.meta, ensure_ascii=False, sort_keys=True).encode(errors="replace")


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """Returns the bytes of an image's file; `form` and `options` are Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def text_sample(key: str, captions: dict[str, str], license: str, attribution: str) -> Sample:
    """Returns a sample without an image: a text in each language."""
    return Sample(
        key, b"", None, "", {"key": key, "captions": captions, "license": license, "attribution": attribution}
    )


def of_keys(samples: Iterable[Sample], wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the samples whose key is wanted."""
    return (sample for sample in samples if wanted(sample.key))


def key_of(path: Path) -> str:
    """Returns the key of the file `path`: the path without its suffix; dots, at which a key would end, become `_`."""
    return path.with_suffix("").as_posix().replace(".", "_")


def is_held_out(name: str, share: float) -> bool:
    """Whether the sample of this key or group is for evaluation: fixed by the name's SHA-256 alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < share * 2**64


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write (name, contents) into a tar whose bytes depend on nothing else."""
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, contents in members:
            member = tarfile.TarInfo(name)  # mtime, uid and gid are 0, the mode is 0644
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))


def tar_members(samples: Iterable[Sample]) -> Iterator[tuple[str, bytes]]:
    """Yields the files of the samples, those of one sample in alphabetical order."""
    for sample in samples:
        files = {"json": sample.json} | ({} if sample.extension is None else {sample.extension: sample.image})
        if sample.caption:
            files["txt"] = sample.caption.encode()
        yield from ((f"{sample.key}.{extension}", files[extension]) for extension in sorted(files))


def write_tar_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write a tar of the samples' files."""
    write_tar(path, tar_members(samples))


def write_arrow_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write an Arrow IPC file without compression, so that an image can be read by its place in the file."""
    schema, samples = _schema_of(samples)
    with replacing(path) as file, pyarrow.ipc.new_file(file, schema) as writer:
        for batch in _batches(samples, ARROW_ROWS, schema):
            writer.write_batch(batch)


def write_parquet_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write a Parquet file of small row groups. Images do not compress, and their min and max mean nothing."""
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    schema, samples = _schema_of(samples)
    with replacing(path) as file, pyarrow.parquet.ParquetWriter(file, schema, **options) as writer:
        for batch in _batches(samples, PARQUET_ROWS, schema):
            writer.write_batch(batch, row_group_size=PARQUET_ROWS)


WRITERS: dict[str, Callable[[Path, Iterable[Sample]], None]] = {
    "tar": write_tar_shard,
    "arrow": write_arrow_shard,
    "parquet": write_parquet_shard,
}


def write_shards(
    samples: Iterable[Sample], folder: Path, prefix: str, format: str, per_shard: int
) -> Iterator[tuple[Path, int]]:
    """Write `folder/PREFIX00000.FORMAT` and so on; yield each shard's path and number of samples once it is complete.

    Raises:
        DataError: a key that no shard can hold, or that came before.
    """
    samples = iter(samples)
    for number in itertools.count():
        first = next(samples, None)
        if first is None:
            return
        path = folder / f"{prefix}{number:05d}.{format}"
        keys: set[str] = set()
        shard = itertools.chain([first], itertools.islice(samples, per_shard - 1))
        WRITERS[format](path, _checked(shard, keys))
        stats = {"count": len(keys), "successes": len(keys), "status_dict": {"success": len(keys)}}
        with replacing(path.with_name(f"{path.stem}_stats.json")) as file:
            file.write(json.dumps(stats).encode())
        yield path, len(keys)


def _checked(samples: Iterable[Sample], keys: set[str]) -> Iterator[Sample]:
    """Yields the samples, after checking that their keys can be read back; adds them to `keys`."""
    for sample in samples:
        folder, _, name = sample.key.rpartition("/")
        if not name or "." in name or "\0" in sample.key or sample.key.startswith("/") or ".." in folder.split("/"):
            raise DataError(f"key '{sample.key}' cannot be a file's name in a tar: give one without a dot")
        if sample.key in keys:
            raise DataError(f"key '{sample.key}' comes twice: give each sample its own")
        keys.add(sample.key)
        yield sample


def _schema_of(samples: Iterable[Sample]) -> tuple[pyarrow.Schema, Iterator[Sample]]:
    """Returns the columns that samples need, and the samples."""
    samples = iter(samples)
    first = list(itertools.islice(samples, 1))
    texts = bool(first) and first[0].extension is None
    return SCHEMA.remove(SCHEMA.get_field_index("image")) if texts else SCHEMA, itertools.chain(first, samples)


def _batches(samples: Iterable[Sample], rows: int, schema: pyarrow.Schema) -> Iterator[pyarrow.RecordBatch]:
    """Yields record batches of `rows` samples, or of fewer where they are large."""
    batch, size = [], 0
    for sample in samples:
        if len(batch) == rows or size >= BATCH_BYTES:
            yield pyarrow.RecordBatch.from_pylist(batch, schema)
            batch, size = [], 0
        row = {"key": sample.key, "image": sample.image, "caption": sample.caption or None}
        batch.append({**row, "json": sample.json.decode()})
        size += len(sample.image) + len(sample.json)
    if batch:
        yield pyarrow.RecordBatch.from_pylist(batch, schema)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that becomes `path` once it is complete and on disk; on an error nothing is left behind."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
