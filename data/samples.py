"""From the files of a tar to its samples: names are split into key and extension, and files of one key joined."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mug.data import tar
from mug.data.errors import DataError
from mug.data.rows import IMAGE, JSON, PARTS, TEXT, Scan, flat_bytes, make_scan
from mug.data.sniff import Sniffed, sniff

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
EXTENSIONS = {**dict.fromkeys(IMAGES, IMAGE), "txt": TEXT, "json": JSON}
MAX_EXTENSION = max(map(len, EXTENSIONS))

LOCAL_WINDOW = 2**12  # bytes read at a time: about one read per sample, bodies being skipped
REMOTE_WINDOW = 2**23  # streams through images of up to some MB, and skips larger ones


def scan_tar(read: tar.Read, size: int, window: int = LOCAL_WINDOW) -> Scan:
    """The samples of a tar: files of one key are joined wherever they lie, in the order of each key's first file.

    Raises:
        DataError: it is cut short or damaged, or holds two images, texts or jsons of one key; the message lacks its
            name.
    """
    keys, parts, places, sniffed = [], [], [], []
    for files in tar.scan(read, size, window):
        part, key_end = split_names(files.names)
        keys.append(_prefixes(files.names, key_end, part >= 0))
        parts.append(part[part >= 0])
        places.append(files.places[part >= 0])
        sniffed.append(sniff(files.heads(part == IMAGE)))
    key_M = pc.dictionary_encode(pa.concat_arrays(keys))
    return _join(key_M, np.concatenate(parts), np.concatenate(places), Sniffed.join(sniffed))


def split_names(names: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Of M names, none empty: the part each is by its extension, int64 [M], -1 for none of a sample's; the length of
    its key, int64 [M].

    As in webdataset, a key is the path up to the first dot of the file's name: `a.b/c.d.png` → `a.b/c`, `d.png`.
    """
    if not len(names):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    data, ends = flat_bytes(names)
    starts, lengths, place = ends[:-1], np.diff(ends), np.arange(len(data))
    slash = np.maximum.reduceat(np.where(data == ord("/"), place, -1), starts)
    base = np.maximum(slash + 1, starts)
    in_base = place >= np.repeat(base, lengths)
    dot = np.minimum.reduceat(np.where((data == ord(".")) & in_base, place, len(data)), starts)
    extension = np.zeros(len(names), np.int64)
    for i in range(1, MAX_EXTENSION + 1):
        here = dot + i < ends[1:]
        extension[here] = extension[here] << 8 | data[dot[here] + i] | 0x20  # in lower case
    part = np.full(len(names), -1)
    for name, kind in EXTENSIONS.items():
        part[extension == int.from_bytes(name.encode(), "big")] = kind
    part[(dot <= base) | (ends[1:] - dot - 1 > MAX_EXTENSION)] = -1
    return part, dot - starts


def _prefixes(names: pa.Array, length: np.ndarray, keep: np.ndarray) -> pa.Array:
    """binary: the first `length` bytes of each name that is kept."""
    data, ends = flat_bytes(names)
    inside = np.arange(len(data)) - np.repeat(ends[:-1], np.diff(ends)) < np.repeat(length * keep, np.diff(ends))
    new_ends = np.concatenate([[0], np.cumsum(length[keep])]).astype(np.int32)
    return pa.Array.from_buffers(
        pa.binary(), int(keep.sum()), [None, pa.py_buffer(new_ends), pa.py_buffer(data[inside])]
    )


def _join(key_M: pa.DictionaryArray, kind_M: np.ndarray, place_M2: np.ndarray, sniffed: Sniffed) -> Scan:
    """One row a key from M files; `sniffed` is of those that are images."""
    n = len(key_M.dictionary)
    sample_M = key_M.indices.to_numpy()
    places = np.full((n, 3, 2), (0, -1), np.int64)
    for kind, part in enumerate(PARTS):
        mine = kind_M == kind
        twice = np.flatnonzero(np.bincount(sample_M[mine], minlength=n) > 1)
        if len(twice):
            key = key_M.dictionary[int(twice[0])].as_py().decode(errors="backslashreplace")
            raise DataError(f"holds two files of one {part}, key '{key}': write distinct keys")
        places[sample_M[mine], kind] = place_M2[mine]
    image_of_key = np.full(n, -1)
    image_of_key[sample_M[kind_M == IMAGE]] = np.arange((kind_M == IMAGE).sum())
    keep = places[:, IMAGE, 1] > 0
    of_keys = Sniffed.join([sniffed, Sniffed.zeros(1)]).take(image_of_key)  # the last: of keys without an image
    return make_scan("tar", key_M.dictionary, places, keep, of_keys)
