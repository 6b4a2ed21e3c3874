"""The rows of the index of one shard: the key of each sample, and where it lies."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mug.data.left_out import LeftOut

IMAGE, TEXT, JSON = range(3)
PARTS = ("image", "text", "json")
PLACES = [f"{part}_{what}" for part in PARTS for what in ("offset", "length")]

SCHEMA = pa.schema([*((name, pa.int64()) for name in PLACES), ("key", pa.string())])


@dataclass(frozen=True, eq=False)
class Scan:
    """The samples found in a shard. format: 'tar', 'arrow', 'arrow_batches' or 'parquet'. rows: of SCHEMA, in the
    shard's order. no_caption: samples whose text is missing or empty. left_out: what is not a sample. For messages,
    seen: its columns or extensions; choice: where captions were taken from, if there was one. group_bytes: max bytes
    of images that are decoded for one of them, where samples are read by groups. texts: whether it has no images at
    all, so that each text or json is a sample."""

    format: str
    rows: pa.RecordBatch
    no_caption: int
    left_out: LeftOut
    seen: str = ""
    choice: str = ""
    group_bytes: int = 0
    texts: bool = False


def make_rows(keys: pa.Array, places: np.ndarray, keep: np.ndarray) -> pa.RecordBatch:
    """Returns the rows of those of N samples that are kept.

    Args:
        keys: string or binary [N].
        places: int64 [N, 3, 2], offset and length of image, text and json; the length is -1 where there is none.
        keep: bool [N], see `complete`.
    """
    columns = places[keep].reshape(-1, 6).T
    return pa.RecordBatch.from_arrays([*map(pa.array, columns), _text(keys.filter(pa.array(keep)))], schema=SCHEMA)


def complete(lengths_N3: np.ndarray, texts: bool) -> np.ndarray:
    """Returns bool [N]: which samples have an image, or in a shard of texts a text or json, of at least one byte.

    lengths_N3: bytes of image, text and json.
    """
    has_N3 = lengths_N3 > 0
    return has_N3[:, TEXT] | has_N3[:, JSON] if texts else has_N3[:, IMAGE]


def _text(keys: pa.Array) -> pa.StringArray:
    """Returns keys as strings; bytes that are not UTF-8 are written \\xNN."""
    try:
        return keys.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([key.decode(errors="backslashreplace") for key in keys.to_pylist()], pa.string())


def flat_bytes(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes of N strings or binary values one after the other, uint8 [M]; where each begins, and the end,
    int64 [N+1]."""
    if not len(values):
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    return np.frombuffer(data or b"", np.uint8)[ends[0] : ends[-1]], ends - ends[0]


def digest(rows: pa.RecordBatch) -> str:
    """Returns the SHA-256 over the keys and places of a shard's samples: the same wherever the shard lies."""
    data, ends = flat_bytes(rows["key"])
    sha = hashlib.sha256(str(len(rows)).encode())
    for column in (ends, data, *(rows[name].to_numpy() for name in PLACES)):
        sha.update(np.ascontiguousarray(column).data)
    return sha.hexdigest()
