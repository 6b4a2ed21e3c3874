"""The rows of the index of one shard: where each sample lies, and what is cheap to know of its image."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mug.data.sniff import Sniffed

IMAGE, TEXT, JSON = range(3)
PARTS = ("image", "text", "json")
PLACES = [f"{part}_{what}" for part in PARTS for what in ("offset", "length")]

SCHEMA = pa.schema(
    [
        *((name, pa.int64()) for name in PLACES),
        ("key", pa.string()),
        ("key_hash", pa.uint64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.uint8()),
        ("flags", pa.uint16()),
    ]
)


@dataclass(frozen=True, eq=False)
class Scan:
    """What was found in a shard. format: 'tar', 'arrow', 'arrow_batches' or 'parquet'. rows: of SCHEMA, in the
    shard's order. left_out: number of keys or rows without an image."""

    format: str
    rows: pa.RecordBatch
    left_out: int


def make_scan(format: str, keys: pa.Array, places: np.ndarray, keep: np.ndarray, sniffed: Sniffed) -> Scan:
    """The rows of N samples, less those that have no image.

    Args:
        keys: string or binary [N].
        places: int64 [N, 3, 2], offset and length of image, text and json; the length is -1 where there is none.
        keep: bool [N], whether there is an image.
        sniffed: of N images.
    """
    keys, places, sniffed = _text(keys.filter(pa.array(keep))), places[keep].reshape(-1, 6), sniffed.take(keep)
    facts = (getattr(sniffed, name) for name in ("width", "height", "format", "flags"))
    columns = [*places.T, keys, hash_keys(keys), *facts]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return Scan(format, pa.RecordBatch.from_arrays(arrays, schema=SCHEMA), int((~keep).sum()))


def _text(keys: pa.Array) -> pa.StringArray:
    """Keys as strings; bytes that are no UTF-8 are written \\xNN."""
    try:
        return keys.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([key.decode(errors="backslashreplace") for key in keys.to_pylist()], pa.string())


def flat_bytes(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of N strings or binary values one after the other, uint8 [M]; where each begins, and the end, int64
    [N+1]."""
    if not len(values):
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    return np.frombuffer(data or b"", np.uint8)[ends[0] : ends[-1]], ends - ends[0]


def hash_keys(keys: pa.StringArray) -> np.ndarray:
    """FNV-1a of the UTF-8 bytes of each key, uint64 [N]; one pass per byte of the longest key."""
    data, ends = flat_bytes(keys)
    lengths = np.diff(ends)
    hashes = np.full(len(keys), 0xCBF29CE484222325, np.uint64)
    live = np.arange(len(keys))
    for i in range(lengths.max(initial=0)):
        live = live[lengths[live] > i]
        hashes[live] = (hashes[live] ^ data[ends[live] + i]) * np.uint64(0x100000001B3)
    return hashes


def digest(rows: pa.RecordBatch) -> str:
    """SHA-256 over the keys and places of a shard's samples: the same wherever the shard lies."""
    data, ends = flat_bytes(rows["key"])
    sha = hashlib.sha256(str(len(rows)).encode())
    for column in (ends, data, *(rows[name].to_numpy() for name in PLACES)):
        sha.update(np.ascontiguousarray(column))
    return sha.hexdigest()
