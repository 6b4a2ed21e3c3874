"""Groups the files of a tar into samples: names are split into key and extension, and files of one key joined."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mug.data.builders.named_files import NamedFiles
from mug.data.errors import DataError
from mug.data.index import tar
from mug.data.index.rows import IMAGE, JSON, PARTS, TEXT, Scan, complete, flat_bytes, make_rows
from mug.data.left_out import LeftOut

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
EXTENSIONS = {**dict.fromkeys(IMAGES, IMAGE), "txt": TEXT, "json": JSON}
UNUSED = "files with a further name that no sample takes (such as k.mask.png)"
NO_IMAGE = "keys without an image"
NO_TEXT = "keys without a text"
EMPTY = "images of 0 bytes"
MAX_EXTENSION = max(map(len, EXTENSIONS))
SHOWN = 10  # extensions in a message

LOCAL_WINDOW = 2**12  # bytes read at a time: about one read per sample, bodies being skipped
REMOTE_WINDOW = 2**23  # streams through images of up to some MB, and skips larger ones


def scan_tar(read: tar.Read, size: int, window: int = LOCAL_WINDOW, caption: str | None = None) -> Scan:
    """Returns the samples of a tar: files of one key are joined wherever they are, by the order of their first file.

    `caption` is the extension of the captions; without it, .txt, or another usual one (see `NamedFiles`).

    Raises:
        DataError: it is cut short or damaged, holds two images, texts or jsons of one key, or no `caption`; the
            message lacks its name.
    """
    keys, parts, places, left_out, first = [], [], [], LeftOut(), None
    caption = None if caption is None or caption.lstrip(".").lower() == "txt" else caption
    named = NamedFiles(EXTENSIONS, caption)
    for files in tar.scan(read, size, window):
        part, key_end = split_names(files.names)
        if caption is not None:
            part[part == TEXT] = -1
        keys.append(_prefixes(files.names, key_end, part >= 0))
        parts.append(part[part >= 0])
        places.append(files.places[part >= 0])
        first = files.names if first is None else first
        for name in named.add(files, np.flatnonzero(part < 0)):
            left_out.add(_kind(name), _quoted(name))
        for name in files.links:
            left_out.add("links", _quoted(name))
    try:
        pairs = named.resolve(pa.concat_arrays(keys), np.concatenate(parts))
    except DataError as error:
        raise DataError(f"{error}; it has {_list_extensions(first)}") from error
    for name in named.unused(pairs):
        left_out.add(UNUSED, _quoted(name))
    keys.append(pa.array([key for key, _ in pairs], pa.binary()))
    parts.append(np.array([file.kind for _, file in pairs], np.int64))
    places.append(np.array([file.place for _, file in pairs], np.int64).reshape(-1, 2))
    key_M = pc.dictionary_encode(pa.concat_arrays(keys))
    scan = _join(key_M, np.concatenate(parts), np.concatenate(places), left_out)
    few = scan.texts or 2 * scan.no_caption >= len(scan.rows)
    return replace(scan, seen=_list_extensions(first) if few else "", choice=named.choice)


def _list_extensions(names: pa.Array) -> str:
    """Returns the extensions of the files, the most frequent first, for a message."""
    bases = (name.decode(errors="backslashreplace").rpartition("/")[2] for name in names.to_pylist())
    counts = Counter("." + base.partition(".")[2] if "." in base else base for base in bases)
    return "files " + ", ".join(extension for extension, _ in counts.most_common(SHOWN)) if counts else "no files"


def split_names(names: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for M names, none empty: the part each is by its extension, int64 [M], -1 for none of a sample's; and
    the length of its key, int64 [M].

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


def _kind(name: bytes) -> str:
    """Returns the kind of a file of a tar that belongs to no sample."""
    base = name.rpartition(b"/")[2].lower()
    _, dot, extension = base.rpartition(b".")
    if base.startswith(b"."):
        return "hidden files"
    return f"'.{extension.decode(errors='backslashreplace')}' files" if dot else "files without an extension"


def _quoted(name: bytes) -> str:
    return f"'{name.decode(errors='backslashreplace')}'"


def _prefixes(names: pa.Array, length: np.ndarray, keep: np.ndarray) -> pa.Array:
    """Returns binary: the first `length` bytes of each name that is kept."""
    data, ends = flat_bytes(names)
    inside = np.arange(len(data)) - np.repeat(ends[:-1], np.diff(ends)) < np.repeat(length * keep, np.diff(ends))
    new_ends = np.concatenate([[0], np.cumsum(length[keep])]).astype(np.int32)
    return pa.Array.from_buffers(
        pa.binary(), int(keep.sum()), [None, pa.py_buffer(new_ends), pa.py_buffer(data[inside])]
    )


def _join(key_M: pa.DictionaryArray, kind_M: np.ndarray, place_M2: np.ndarray, left_out: LeftOut) -> Scan:
    """Returns one row a key from M files. Adds keys without an image, or of texts without one, to `left_out`."""
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
    length, texts = places[:, IMAGE, 1], n > 0 and not (kind_M == IMAGE).any()
    keep = complete(places[..., 1], texts)
    reasons = ((NO_TEXT, ~keep),) if texts else ((NO_IMAGE, length < 0), (EMPTY, length == 0))
    for kind, missing in reasons:
        if missing.any():
            left_out.add(kind, _quoted(key_M.dictionary[int(missing.argmax())].as_py()), int(missing.sum()))
    no_caption = int((keep & (places[:, TEXT, 1] <= 0)).sum())
    return Scan("tar", make_rows(key_M.dictionary, places, keep), no_caption, left_out, texts=texts)
