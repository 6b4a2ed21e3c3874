"""Tar shards: which files, where each sample lies in them, and the reading of one sample."""

import glob
import hashlib
import json
import logging
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mug.data.errors import DataError

IMAGE, TEXT, JSON = range(3)
KINDS = {"png": IMAGE, "jpg": IMAGE, "jpeg": IMAGE, "webp": IMAGE, "txt": TEXT, "json": JSON}
MAX_BYTES = 64 * 2**20  # of one member

log = logging.getLogger("mug")


def _braces(pattern: str) -> list[str]:
    """`a{00..02}b` → a00b, a01b, a02b; `{x,y}` → x, y. Braces do not nest."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        width = len(span[1]) if span[1].startswith("0") else 0
        inside = [f"{i:0{width}d}" for i in range(int(span[1]), int(span[2]) + 1)]
    else:
        inside = match[1].split(",")
    return [p for one in inside for p in _braces(pattern[: match.start()] + one + pattern[match.end() :])]


def expand(patterns: str) -> list[Path]:
    """The shards that paths, globs and brace ranges name, separated by commas or spaces; globs come sorted.

    Raises:
        DataError: a pattern that matches no file, or that is not a path on this machine.
    """
    paths = []
    for pattern in re.split(r"[,\s]+(?![^{]*\})", patterns.strip(", \n")):  # not inside braces
        if "://" in pattern or pattern.startswith("pipe:"):
            raise DataError(f"shards '{pattern}': only local paths are read; copy or mount the shards")
        for one in _braces(os.path.expanduser(pattern)):
            matches = sorted(glob.glob(one)) or [one]
            missing = [path for path in matches if not os.path.isfile(path)]
            if missing:
                raise DataError(f"missing shards: '{missing[0]}' matches no file: correct the path or pattern")
            paths += matches
    return [Path(path) for path in paths]


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where N samples lie: sample i is in `paths[shards[i]]`.

    shards: int32 [N]. keys: bytes [N]. spans: int64 [N, 3, 2], the offset and length in bytes of the image,
    the text and the json; the length is -1 where there is none.
    """

    paths: list[Path]
    sizes: list[int]
    shards: np.ndarray
    keys: np.ndarray
    spans: np.ndarray

    @staticmethod
    def scan(paths: list[Path]) -> "ShardIndex":
        """Read the headers of all shards. Samples keep the order of the shards and of the files inside.

        Raises:
            DataError: a shard is damaged or cut short, holds one file twice, or no shard holds an image.
        """
        per_shard = [_scan_shard(path) for path in paths]
        if not sum(len(rows) for rows in per_shard):
            raise DataError(f"no images ({', '.join(KINDS)}) in {len(paths)} shards, '{paths[0]}' the first")
        keys = [key.encode() for rows in per_shard for key in rows]
        spans = [spans for rows in per_shard for spans in rows.values()]
        counts = [len(rows) for rows in per_shard]
        return ShardIndex(
            paths=paths,
            sizes=[path.stat().st_size for path in paths],
            shards=np.repeat(np.arange(len(paths), dtype=np.int32), counts),
            keys=np.array(keys, dtype=np.bytes_),
            spans=np.array(spans, dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.keys)

    def fingerprint(self) -> str:
        """SHA-256 over the shards' names and sizes and the samples' keys and places."""
        names = [[path.name, size] for path, size in zip(self.paths, self.sizes, strict=True)]
        digest = hashlib.sha256(json.dumps(names).encode())
        for array in (self.shards, self.keys, self.spans):
            digest.update(str((array.dtype.str, array.shape)).encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def name(self, row: int) -> str:
        """What to call a sample in a message: its shard and key."""
        return f"shard '{self.paths[self.shards[row]]}', key '{self.keys[row].decode()}'"

    def read(self, row: int, kind: int) -> bytes:
        """The bytes of a sample's IMAGE, TEXT or JSON; empty where it has none.

        Raises:
            DataError: the file cannot be read, or is shorter than it was.
        """
        offset, length = self.spans[row, kind].tolist()
        if length <= 0:
            return b""
        if length > MAX_BYTES:
            raise DataError(f"{self.name(row)}: {length:,} bytes is more than {MAX_BYTES:,}")
        try:
            with open(self.paths[self.shards[row]], "rb", buffering=0) as file:
                data = os.pread(file.fileno(), length, offset)
        except OSError as error:
            raise DataError(f"{self.name(row)}: cannot be read: {error}") from error
        if len(data) != length:
            raise DataError(f"{self.name(row)}: the shard is shorter than when it was indexed; start anew")
        return data


def _scan_shard(path: Path) -> dict[str, list]:
    """key → spans [3][2] of one shard, keys in the order of their first file, only those with an image."""
    rows: dict[str, list] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // 512) * 512
                key, extension = _split(member.name)
                kind = KINDS.get(extension.lower())
                if not member.isreg() or kind is None:
                    continue
                spans = rows.setdefault(key, [[0, -1], [0, -1], [0, -1]])
                if spans[kind][1] >= 0:
                    raise DataError(f"shard '{path}', key '{key}': a second .{extension}; write distinct keys")
                spans[kind] = [member.offset_data, member.size]
            tar.fileobj.seek(end)
            closed = len(tar.fileobj.read(512)) == 512
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"shard '{path}' is no readable tar ({error}): fetch or write it anew") from error
    if not closed:  # tarfile says nothing of a tar that was cut between two files
        raise DataError(f"shard '{path}' has no end mark, so it was cut short: fetch or write it anew")
    whole = {key: spans for key, spans in rows.items() if spans[IMAGE][1] >= 0}
    if len(whole) < len(rows):
        log.warning("shard '%s': left out %d keys without an image", path, len(rows) - len(whole))
    return whole


def _split(name: str) -> tuple[str, str]:
    """`a.b/c.d.png` → `a.b/c`, `d.png`: as in webdataset, an extension begins at the name's first dot."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension
