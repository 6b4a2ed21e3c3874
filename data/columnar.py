"""Samples in Arrow and Parquet files: where they lie, and the reading of those that lie in no one place.

In an Arrow file whose buffers are not compressed a value has an absolute offset, like a file in a tar. In any other
Arrow file, and in Parquet, a value's place is its record batch or row group and its row in there, and reading one
decodes that column of the whole group.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mug.data.errors import DataError
from mug.data.rows import PARTS, Scan, make_scan
from mug.data.sniff import Sniffed, heads_of, sniff

# part → names of its column, the first that is there being read: those of img2dataset, webdataset, datasets.
NAMES = {
    "image": ("jpg", "jpeg", "png", "webp", "image"),
    "text": ("txt", "caption", "text"),
    "json": ("json",),
    "key": ("key", "__key__"),
}
BYTES = (pa.binary(), pa.large_binary())
STRINGS = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
BATCH = 1024  # rows of a Parquet row group decoded at a time


def find_columns(schema: pa.Schema) -> dict[str, str]:
    """part → name of the column that holds it: 'image', and 'text', 'json' and 'key' where there is one.

    Raises:
        DataError: there is no column of images; the message lacks the shard's name.
    """
    found = {}
    for part, names in NAMES.items():
        for name in names:
            if part not in found and name in schema.names and _holds(part, schema.field(name).type):
                found[part] = name
    if "image" not in found:
        raise DataError(
            f"has no image column: name one {', '.join(NAMES['image'])}, of binary values (or leave out this file)"
        )
    return found


def _holds(part: str, type: pa.DataType) -> bool:
    if part == "key":
        return not pa.types.is_nested(type)
    if pa.types.is_struct(type):  # an image of Hugging Face datasets: {bytes, path}
        return part == "image" and type.get_field_index("bytes") >= 0 and type.field("bytes").type in BYTES
    if pa.types.is_dictionary(type):
        type = type.value_type
    return type in BYTES or (part != "image" and type in STRINGS)


def _plain(column: pa.Array) -> pa.Array:
    """The column as binary values, in the same buffers where they can be."""
    if pa.types.is_struct(column.type):
        column = column.flatten()[column.type.get_field_index("bytes")]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(STRINGS.get(column.type, column.type))


@dataclass(frozen=True, eq=False)
class _Values:
    """N values: value i is data[start[i] : start[i] + length[i]], length -1 for null. Its buffer is at `address`."""

    data: np.ndarray
    start: np.ndarray
    length: np.ndarray
    address: int

    @staticmethod
    def of(column: pa.Array) -> "_Values":
        column.validate(full=True)  # offsets of a damaged file may point anywhere
        _, offsets, data = column.buffers()
        ends = np.frombuffer(offsets or b"", np.int64 if pa.types.is_large_binary(column.type) else np.int32)
        ends = ends[column.offset : column.offset + len(column) + 1].astype(np.int64)
        length = np.where(column.is_null().to_numpy(zero_copy_only=False), -1, np.diff(ends))
        bytes_ = np.frombuffer(data or b"", np.uint8)
        return _Values(bytes_, ends[:-1], length, data.address if data else 0)

    def absolute(self, file: pa.Buffer) -> np.ndarray | None:
        """int64 [N, 2]: offset and length in the `file` these values are a view of; None if they are a copy."""
        start = self.address - file.address
        if self.length.max(initial=0) > 0 and not 0 <= start <= start + len(self.data) <= file.size:
            return None
        return np.stack([np.where(self.length > 0, start + self.start, 0), self.length], axis=1)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Some rows of a shard: keys string [N]; places int64 [N, 3, 2], by group and, where they can be, absolute."""

    keys: pa.Array
    by_group: np.ndarray
    absolute: np.ndarray | None
    has_image: np.ndarray
    sniffed: Sniffed


@dataclass
class _Reader:
    """Goes through the record batches of one shard. `row`: rows before the next batch, in the whole shard."""

    columns: dict[str, str]
    file: pa.Buffer | None  # that batches may be views of
    row: int = 0

    def rows(self, batch: pa.RecordBatch, group: int, first: int) -> _Rows:
        """Of a batch that begins at row `first` of its group."""
        values = {p: _Values.of(_plain(batch[self.columns[p]])) for p in PARTS if p in self.columns}
        by_group = np.full((len(batch), 3, 2), (0, -1), np.int64)
        absolute = by_group.copy()
        for i, part in enumerate(PARTS):
            if part in values:
                row = np.where(values[part].length >= 0, np.arange(first, first + len(batch)), -1)
                by_group[:, i] = np.stack([np.full(len(batch), group), row], axis=1)
                place = values[part].absolute(self.file) if self.file and absolute is not None else None
                if place is None:
                    absolute = None
                else:
                    absolute[:, i] = place
        image = values["image"]
        sniffed = sniff(heads_of(image.data, image.start, image.length))
        return _Rows(self._keys(batch), by_group, absolute, image.length > 0, sniffed)

    def _keys(self, batch: pa.RecordBatch) -> pa.Array:
        numbers = pa.array(np.arange(self.row, self.row + len(batch))).cast(pa.string())
        self.row += len(batch)
        keys = pc.utf8_lpad(numbers, 9, "0")
        return pc.coalesce(batch[self.columns["key"]].cast(pa.string()), keys) if "key" in self.columns else keys


def scan_columnar(path: Path) -> Scan:
    """The samples of an Arrow file (IPC file or stream format) or a Parquet file.

    A key is the row's number where the file has no column of keys. Rows whose image is null or empty are left out.

    Raises:
        DataError: the file is damaged, cut short, or has no image column; the message lacks its name.
    """
    parquet = _is_parquet(path)
    try:
        parts = list(_parquet_rows(path) if parquet else _arrow_rows(path))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot be read: {str(error).splitlines()[0]}: fetch or write it anew") from error
    absolute = not parquet and all(part.absolute is not None for part in parts)
    places = [part.absolute if absolute else part.by_group for part in parts]
    return make_scan(
        "parquet" if parquet else "arrow" if absolute else "arrow_batches",
        pa.concat_arrays([part.keys for part in parts] or [pa.array([], pa.string())]),
        np.concatenate([np.empty((0, 3, 2), np.int64), *places]),
        np.concatenate([np.empty(0, bool), *(part.has_image for part in parts)]),
        Sniffed.join([part.sniffed for part in parts]),
    )


def _is_parquet(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _arrow_rows(path: Path) -> Iterator[_Rows]:
    with pa.memory_map(str(path)) as mapped:
        file = mapped.read_buffer()
    if file[:6].to_pybytes() == b"ARROW1":
        source = pa.ipc.open_file(file)
        batches = (source.get_batch(i) for i in range(source.num_record_batches))
    elif file[-8:].to_pybytes() == STREAM_END:
        source = batches = pa.ipc.open_stream(file)
    else:
        raise DataError("has no end mark, so it was cut short: fetch or write it anew")
    reader = _Reader(find_columns(source.schema), file)
    for group, batch in enumerate(batches):
        rows = reader.rows(batch, group, 0)
        if source is batches and rows.absolute is None:
            raise DataError("is an Arrow stream with compressed or coded values: write it anew as an Arrow file")
        yield rows


def _parquet_rows(path: Path) -> Iterator[_Rows]:
    with pq.ParquetFile(path) as file:
        reader = _Reader(find_columns(file.schema_arrow), None)
        names = [_leaf(file.schema_arrow, name) for name in reader.columns.values()]
        for group in range(file.num_row_groups):
            first = 0
            for batch in file.iter_batches(BATCH, [group], names):
                yield reader.rows(batch, group, first)
                first += len(batch)


def _leaf(schema: pa.Schema, name: str) -> str:
    return f"{name}.bytes" if pa.types.is_struct(schema.field(name).type) else name


class Groups:
    """Reads values by group and row, and keeps the columns it has decoded, up to `limit` bytes. Cheap to pickle."""

    def __init__(self, limit: int = 2**28):
        self.limit = limit
        self.held = 0  # bytes
        self.decoded: OrderedDict[tuple[Path, int, int], pa.Array] = OrderedDict()
        self.files = lru_cache(maxsize=16)(_open)

    def __reduce__(self):
        return Groups, (self.limit,)

    def read(self, path: Path, part: int, group: int, row: int) -> bytes:
        """IMAGE, TEXT or JSON of the sample at `row` of a group of the shard whose copy on disk is `path`.

        Raises:
            DataError: the file cannot be read, or is not the one that was indexed.
        """
        try:
            value = self._column(path, part, group)[row].as_py()
        except (OSError, pa.ArrowException, IndexError, KeyError) as error:
            raise DataError(f"shard '{path}', group {group}, row {row}: cannot be read: {error}") from error
        return value or b""

    def _column(self, path: Path, part: int, group: int) -> pa.Array:
        key = (path, part, group)
        if key not in self.decoded:
            column = self.files(path, part)(group)
            self.held += column.nbytes
            self.decoded[key] = column
            while self.held > self.limit and len(self.decoded) > 1:
                self.held -= self.decoded.popitem(last=False)[1].nbytes
        self.decoded.move_to_end(key)
        return self.decoded[key]


def _open(path: Path, part: int) -> Callable[[int], pa.Array]:
    """A function: group → the column of IMAGE, TEXT or JSON in that group, no other column being decoded."""
    if _is_parquet(path):
        parquet = pq.ParquetFile(path)
        leaf = _leaf(parquet.schema_arrow, find_columns(parquet.schema_arrow)[PARTS[part]])
        return lambda group: _plain(parquet.read_row_group(group, [leaf]).column(0).combine_chunks())
    mapped = pa.memory_map(str(path))
    schema = pa.ipc.open_file(mapped).schema
    field = schema.get_field_index(find_columns(schema)[PARTS[part]])
    arrow = pa.ipc.open_file(mapped, options=pa.ipc.IpcReadOptions(included_fields=[field]))
    return lambda group: _plain(arrow.get_batch(group).column(0))
