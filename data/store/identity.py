"""Checks that a shard is the one that was indexed: by its content, never by a time, so that copies of it pass.

What is compared depends on what a reader relies on. In a tar each file's header, which is read with its body, must be
that of the sample's key and part. An Arrow file's values must lie where the index says. Of every shard that has no
ETag the last bytes must be those that were indexed: they hold the footer of Arrow and Parquet, which locates all
else, and the end of a tar, after which files are appended.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mug.data.errors import DataError
from mug.data.index.columnar import lies_where
from mug.data.index.index import Index
from mug.data.index.rows import digest
from mug.data.index.tar_samples import REMOTE_WINDOW, scan_tar

TAIL = 2**16  # bytes
Read = Callable[[int, int], bytes]  # (offset, length) → that many bytes


def seal(read: Read, size: int) -> str:
    """Returns the SHA-256 of the last TAIL bytes of a file of `size` bytes."""
    length = min(size, TAIL)
    return hashlib.sha256(read(size - length, length)).hexdigest()


@dataclass(frozen=True, eq=False)
class Identity:
    """Compares shards with an index. Cheap to pickle."""

    index: Index

    def differs(self, shard: int, read: Read, path: Path | None) -> str:
        """Returns how the shard just opened differs from the one that was indexed; "" where it does not.

        path: its file on this machine, if it is here.
        """
        sealed = self.index.seals[shard]
        if sealed and seal(read, int(self.index.sizes[shard])) != sealed:
            return "its last bytes differ"
        if (
            self.index.formats[shard] == "arrow"
            and path
            and not lies_where(path, self.index.rows(shard), self.index.caption)
        ):
            return "its samples have moved"
        return ""

    def is_same_tar(self, shard: int, read: Read) -> bool:
        """Whether a scan of the entire tar finds the samples of the index: where a header alone does not show it."""
        size = int(self.index.sizes[shard])
        try:
            found = scan_tar(
                lambda offset, length: read(offset, min(length, size - offset)), size, REMOTE_WINDOW, self.index.caption
            )
        except DataError:
            return False
        return digest(found.rows) == self.index.digests[shard]
