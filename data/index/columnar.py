"""Samples in Arrow and Parquet files: where they lie, and the reading of those without a fixed place.

In an Arrow file whose buffers are not compressed a value has an absolute offset, like a file in a tar. In any other
Arrow file, and in Parquet, a value's place is its record batch or row group and its row in there, and reading one
decodes that column of the entire group.
"""

import json
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mug.data.captions import MAIN, SEPARATOR, rank, texts
from mug.data.errors import DataError
from mug.data.index.index import ShardRows
from mug.data.index.rows import IMAGE, PARTS, PLACES, TEXT, Scan, complete, make_rows
from mug.data.left_out import LeftOut

# part → names of its column, the first that is there being read: those of img2dataset, webdataset, datasets.
# Those of captions are in mug.data.captions.
NAMES = {
    "image": ("jpg", "jpeg", "png", "webp", "image"),
    "json": ("json",),
    "key": ("key", "__key__"),
}
BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())
STRINGS = (pa.string(), pa.large_string(), pa.string_view())
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
MAX_GROUP = 2**31 - 1  # bytes of values with 32-bit offsets that Arrow reads as one column
BATCH, BATCH_BYTES = 1024, 2**28  # of a Parquet row group decoded at a time, whichever is less
SHOWN = 20  # columns in a message


def find_columns(schema: pa.Schema, caption: str | None = None, texts: bool = False) -> dict[str, str]:
    """Returns part → name of the column that holds it: 'image', and 'text', 'json' and 'key' where there is one.

    `caption` names the column of captions; without it, the likeliest is taken. With `texts`, a column of texts or
    jsons is enough.

    Raises:
        DataError: there is no column of images, or none `caption`; the message lacks the shard's name.
    """
    found = {}
    for part, names in NAMES.items():
        # The case of a name decides last: indexes were written by the names as they are here.
        usual = _in_order(schema.names, names, any_case=part == "image")
        if held := [name for name in usual if _holds(part, schema.field(name).type)]:
            found[part] = held[0]
    captions = text_columns(schema, caption)
    if "image" not in found and not (texts and (captions or "json" in found)):
        raise DataError(
            f"has no image column: name one {', '.join(NAMES['image'])}, of binary values (or leave out this file); it"
            f" has {shown_columns(schema)}"
        )
    if captions and captions[0] == found.get("image"):
        raise DataError(
            f"has images in the column '{captions[0]}', which data.caption names; it has {shown_columns(schema)}"
        )
    if captions and "json" in found and pa.types.is_struct(schema.field(found["json"]).type):
        del found["json"]  # an object's only use is the caption in it
    return found | dict(zip(["text"], captions, strict=False))


def text_columns(schema: pa.Schema, caption: str | None) -> list[str]:
    """Returns the columns of captions by name and type, the likeliest first: plain text before lists and objects.

    Raises:
        DataError: `caption`, the only one if it is given, does not hold text.
    """
    texts = [name for name in schema.names if _holds("text", schema.field(name).type)]
    if caption is not None:
        if caption not in texts:
            raise DataError(
                f"has no text in a column '{caption}', which data.caption names; it has {shown_columns(schema)}"
            )
        return [caption]
    names = [name for name in texts if rank(name) is not None]
    return sorted(
        names, key=lambda name: (pa.types.is_nested(schema.field(name).type), name not in MAIN, rank(name), name)
    )


def shown_columns(schema: pa.Schema) -> str:
    """Returns the names and types of the columns, for a message."""
    names = [f"{field.name} ({str(field.type).partition('<')[0]})" for field in schema]
    return "columns " + ", ".join(names[:SHOWN] + [f"and {len(names) - SHOWN} more"] * (len(names) > SHOWN))


def _in_order(names: list[str], wanted: tuple[str, ...], any_case: bool) -> list[str]:
    """Returns the names that are wanted, in that order; those that agree in case before all others."""
    found = [name for name in names if (name.lower() if any_case else name) in wanted]
    return sorted(found, key=lambda name: (name not in wanted, wanted.index(name.lower())))


def _holds(part: str, type: pa.DataType) -> bool:
    if part == "key":
        return not pa.types.is_nested(type)
    if pa.types.is_struct(type) and part == "image":  # an image of Hugging Face datasets: {bytes, path}
        return type.get_field_index("bytes") >= 0 and type.field("bytes").type in BYTES
    if pa.types.is_struct(type) and part == "json":
        return True
    if pa.types.is_nested(type) and not pa.types.is_map(type):
        return part == "text" and any(_holds(part, type.field(i).type) for i in range(type.num_fields))
    if pa.types.is_dictionary(type):
        type = type.value_type
    return type in BYTES or (part != "image" and type in STRINGS)


def _plain(column: pa.Array, part: str) -> pa.Array:
    """Returns the column as binary values, in the same buffers where they can be."""
    if pa.types.is_nested(column.type) and part != "image":
        return pa.array([_as_bytes(value, part) for value in column.to_pylist()], pa.large_binary())
    if pa.types.is_struct(column.type):
        column = column.flatten()[column.type.get_field_index("bytes")]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    large = column.type in (pa.large_string(), pa.large_binary())
    return column.cast(pa.large_binary() if large else pa.binary())


def _as_bytes(value: object, part: str) -> bytes | None:
    """Returns what a file of a tar would hold: a json, or the captions of lists and objects; None for none."""
    if part == "json":
        return None if value is None else json.dumps(value, default=str).encode()
    return SEPARATOR.join(texts(value)).encode(errors="replace") or None


def _locate(batch: pa.RecordBatch, columns: dict[str, str], file: pa.Buffer | None) -> np.ndarray:
    """Returns int64 [N, 3, 2]: where in `file` image, text and json of N rows begin, -1 for copies of them; and how
    many bytes they have, -1 for none."""
    places = np.full((len(batch), 3, 2), (0, -1), np.int64)
    for i, part in enumerate(PARTS):
        if part in columns:
            column = _plain(batch[columns[part]], part)
            column.validate(full=True)  # offsets of a damaged file may point anywhere
            length = pc.fill_null(pc.binary_length(column), -1).to_numpy()
            places[:, i, 0] = np.where(length > 0, _starts(column, file), 0)
            places[:, i, 1] = length
    return places


def _starts(column: pa.Array, file: pa.Buffer | None) -> np.ndarray | int:
    """Returns where in `file` binary values begin, int64 [N]; -1 if they are a copy."""
    _, ends, data = column.buffers()
    if not (file and data):
        return -1
    start = data.address - file.address
    if not 0 <= start <= start + data.size <= file.size:
        return -1
    ends = np.frombuffer(ends, np.int64 if pa.types.is_large_binary(column.type) else np.int32)
    return start + ends[column.offset : column.offset + len(column)].astype(np.int64)


def _keys(batch: pa.RecordBatch, name: str | None, row: int) -> pa.Array:
    """Returns the keys, string [N]; `row`: of the first in the shard, whose number is the key if there is no other."""
    keys = pc.utf8_lpad(pa.array(np.arange(row, row + len(batch))).cast(pa.string()), 9, "0")
    if name is None:
        return keys
    batch[name].validate(full=True)  # as of the other values
    return pc.coalesce(batch[name].cast(pa.string()), keys)


def scan_columnar(path: Path, caption: str | None = None) -> Scan:
    """Returns the samples of an Arrow file (IPC file or stream) or a Parquet file; `caption` as in `find_columns`.

    A key is the row's number where the file has no column of keys. Rows whose image is null or empty are left out; of
    a file without a column of images, those that have neither a text nor a json.

    Raises:
        DataError: the file is damaged, cut short, or has no such column; the message lacks its name.
    """
    parquet = _is_parquet(path)
    try:
        file = None if parquet else _map(path)
        source = pq.ParquetFile(path) if parquet else _open_arrow(file)
        schema = source.schema_arrow if parquet else source.schema
        columns = find_columns(schema, caption, texts=True)
        batches = _parquet_batches(source, columns) if parquet else _arrow_batches(source)
        return _scan(batches, schema, columns, file, caption)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        raise DataError(
            f"cannot be read: {(str(error).splitlines() or ['damaged'])[0]}: fetch or rewrite it"
        ) from error


def _scan(
    batches: Iterable[tuple[int, int, pa.RecordBatch]],
    schema: pa.Schema,
    columns: dict[str, str],
    file: pa.Buffer | None,
    caption: str | None,
) -> Scan:
    """Yields the samples of batches, with their group and first row there; those of an Arrow file are views of it."""
    keys, places, rows = [pa.array([], pa.string())], [np.empty((0, 3, 2), np.int64)], [np.empty((0, 2), np.int64)]
    texts = "image" not in columns
    limit = sys.maxsize if texts or _has_long_offsets(schema.field(columns["image"]).type) else MAX_GROUP
    sizes: Counter[int] = Counter()
    count = 0
    for group, first, batch in batches:
        keys.append(_keys(batch, columns.get("key"), count))
        count += len(batch)
        places.append(_locate(batch, columns, file))
        rows.append(np.stack([np.full(len(batch), group), np.arange(first, first + len(batch))], axis=1))
        sizes[group] += int(places[-1][:, IMAGE, 1].clip(0).sum())
        if sizes[group] > limit:
            raise DataError(
                f"holds more than {limit / 1e9:.1f} GB of images in its row group {group}, which cannot be "
                "read as one: rewrite it with row groups of about 100 rows (row_group_size=100)"
            )
    keys_N, places_N32, rows_N2 = pa.concat_arrays(keys), np.concatenate(places), np.concatenate(rows)
    keep, has_text = complete(places_N32[..., 1], texts), places_N32[:, TEXT, 1] > 0
    copied = np.any(places_N32[..., 0] < 0, axis=0)
    if file and not _is_arrow_file(file) and (copied.any() if texts else copied[IMAGE]):
        raise DataError("is an Arrow stream with compressed or encoded values: rewrite it as an Arrow file")
    in_place = file is not None and not copied.any()
    if not in_place:
        for i in (PARTS.index(part) for part in PARTS if part in columns):
            present = places_N32[:, i, 1] >= 0
            places_N32[:, i] = np.stack([rows_N2[:, 0], np.where(present, rows_N2[:, 1], -1)], axis=1)
    left_out = LeftOut()
    if not keep.all():
        missing = "rows without a text" if texts else "rows without an image"
        left_out.add(missing, f"'{keys_N[int(keep.argmin())]}'", int((~keep).sum()))
    return Scan(
        "parquet" if file is None else "arrow" if in_place else "arrow_batches",
        make_rows(keys_N, places_N32, keep),
        int((keep & ~has_text).sum()),
        left_out,
        *_seen(schema, caption),
        0 if in_place else max(sizes.values(), default=0),
        texts,
    )


def lies_where(path: Path, rows: ShardRows, caption: str | None) -> bool:
    """Whether the images, texts and jsons of an Arrow file lie at the places in `rows`; no image is looked at.

    `caption` as in `find_columns`.
    """
    found = [np.empty((0, 3, 2), np.int64)]
    try:
        file = _map(path)
        source = _open_arrow(file)
        columns = find_columns(source.schema, caption, texts=True)
        found += [_locate(batch, columns, file) for _, _, batch in _arrow_batches(source)]
    except (pa.ArrowException, OSError, ValueError, DataError):
        return False
    places = np.concatenate(found)
    places = places[complete(places[..., 1], "image" not in columns)].reshape(-1, 6)
    return len(places) == len(rows) and all(
        np.array_equal(places[:, i], getattr(rows, name)) for i, name in enumerate(PLACES)
    )


def _seen(schema: pa.Schema, caption: str | None) -> tuple[str, str]:
    """Returns the columns, and where captions were taken from, if there was a choice. For messages."""
    candidates = text_columns(schema, caption)
    others = ", ".join(f"'{name}'" for name in candidates[1:])
    return shown_columns(schema), f"column '{candidates[0]}', not {others}" if others else ""


def _is_parquet(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _is_arrow_file(file: pa.Buffer) -> bool:
    return file[:6].to_pybytes() == b"ARROW1"


def _map(path: Path) -> pa.Buffer:
    with pa.memory_map(str(path)) as mapped:
        return mapped.read_buffer()


def _open_arrow(
    file: pa.Buffer, fields: list[int] | None = None
) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    """Opens an Arrow file or stream, or only those of its fields.

    Raises:
        DataError: it was cut short.
    """
    options = pa.ipc.IpcReadOptions(included_fields=fields)
    if _is_arrow_file(file):
        return pa.ipc.open_file(file, options=options)
    if file[-8:].to_pybytes() == STREAM_END:
        return pa.ipc.open_stream(file, options=options)
    raise DataError("has no end mark, so it was cut short: fetch or rewrite it")


def _arrow_batches(
    source: pa.RecordBatchFileReader | pa.RecordBatchStreamReader,
) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    is_stream = isinstance(source, pa.RecordBatchStreamReader)
    batches = source if is_stream else map(source.get_batch, range(source.num_record_batches))
    return ((group, 0, batch) for group, batch in enumerate(batches))


def _parquet_batches(source: pq.ParquetFile, columns: dict[str, str]) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    names = [_leaf(source.schema_arrow, part, name) for part, name in columns.items()]
    for group in range(source.num_row_groups):
        stored = source.metadata.row_group(group)  # of its columns a damaged file may end the process
        mean = stored.total_byte_size // max(1, stored.num_rows)
        first = 0
        for batch in source.iter_batches(max(1, min(BATCH, BATCH_BYTES // max(1, mean))), [group], names):
            yield group, first, batch
            first += len(batch)


def _has_long_offsets(type: pa.DataType) -> bool:
    return (type.field("bytes").type if pa.types.is_struct(type) else type) == pa.large_binary()


def _leaf(schema: pa.Schema, part: str, name: str) -> str:
    return f"{name}.bytes" if part == "image" and pa.types.is_struct(schema.field(name).type) else name


class Groups:
    """Reads values by group and row, and keeps the columns it has decoded, up to `limit` bytes. Cheap to pickle.

    `caption` as the shards were indexed with, see `find_columns`.
    """

    def __init__(self, limit: int = 2**28, caption: str | None = None):
        self.limit = limit
        self.caption = caption
        self.held = 0  # bytes
        self.decoded: OrderedDict[tuple[Path, int, int], pa.Array] = OrderedDict()
        self.files = lru_cache(maxsize=16)(_open)

    def __reduce__(self):
        return Groups, (self.limit, self.caption)

    def read(self, path: Path, part: int, group: int, row: int) -> bytes:
        """Returns IMAGE, TEXT or JSON of the sample at `row` of a group of the shard whose copy on disk is `path`.

        Raises:
            DataError: the file cannot be read, or is not the one that was indexed.
        """
        try:
            value = self._column(path, part, group)[row].as_py()
        except (OSError, pa.ArrowException, IndexError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"shard '{path}', group {group}, row {row}: cannot be read: {reason}") from error
        return value or b""

    def _column(self, path: Path, part: int, group: int) -> pa.Array:
        key = (path, part, group)
        if key not in self.decoded:
            column = self.files(path, part, self.caption)(group)
            self.held += column.nbytes
            self.decoded[key] = column
            while self.held > self.limit and len(self.decoded) > 1:
                self.held -= self.decoded.popitem(last=False)[1].nbytes
        self.decoded.move_to_end(key)
        return self.decoded[key]


def _open(path: Path, part: int, caption: str | None) -> Callable[[int], pa.Array]:
    """Returns a function: group → the column of IMAGE, TEXT or JSON in that group, no other column being decoded."""
    name = PARTS[part]
    if _is_parquet(path):
        parquet = pq.ParquetFile(path)
        leaf = _leaf(parquet.schema_arrow, name, find_columns(parquet.schema_arrow, caption, texts=True)[name])
        return lambda group: _plain(parquet.read_row_group(group, [leaf]).column(0).combine_chunks(), name)
    file = _map(path)
    schema = _open_arrow(file).schema
    arrow = _open_arrow(file, [schema.get_field_index(find_columns(schema, caption, texts=True)[name])])
    # The batches of a stream are views of the file.
    get = list(arrow).__getitem__ if isinstance(arrow, pa.RecordBatchStreamReader) else arrow.get_batch
    return lambda group: _plain(get(group).column(0), name)
