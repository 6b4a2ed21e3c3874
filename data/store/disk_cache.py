"""Complete shards on this machine's disk, shared by all its processes and bounded in bytes.

In the folder, NAME is a complete shard and NAME.part one being fetched. The writer of a part holds its lock, a reader
of a complete shard, or one that wants it next, holds a share of its lock, and a change of names holds the folder's.
All locks are the kernel's (flock), so they end with their process, and a part without a lock is what a crash left.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mug.data.errors import DataError
from mug.data.store.remote import LOG_SECONDS, Shard, unsigned

PART = ".part"
NAME = re.compile(r"[0-9a-f]{32}-[0-9]+(\.part)?")
TOUCH_SECONDS = 5.0  # resolution of the times of use

log = logging.getLogger("mug")


class Descriptor:
    """A file descriptor that closes with its last reference, so that no thread closes what another reads."""

    def __init__(self, path: Path | str, flags: int = os.O_RDONLY):
        self.number = os.open(path, flags | os.O_CLOEXEC, 0o644)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.number, length, offset)  # a caller with the number alone might lose the file

    def lock(self, kind: int) -> bool:
        """Call flock; False where LOCK_NB is in `kind` and another holds the lock."""
        try:
            fcntl.flock(self.number, kind)
        except BlockingIOError:
            return False
        return True


class CacheFull(Exception):
    """The cache is full of shards that are being fetched or read, or wanted next."""


class DiskCache:
    """A folder of at most `limit` bytes of shards. Any number of processes may use it at once.

    Raises:
        DataError: from every method, when the folder cannot be used.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder = folder
        self.limit = limit
        self._warned = -LOG_SECONDS
        with self._disk():
            folder.mkdir(parents=True, exist_ok=True)
            with self._folder_lock():
                self._clear()

    def path(self, shard: Shard) -> Path:
        """Returns the path of the complete shard. Another content has another name, another signature has not."""
        content = f"{unsigned(shard.url)}\n{shard.etag}" if shard.etag else f"{shard.url}\n{shard.mark}"
        digest = hashlib.sha256(content.encode()).hexdigest()[:32]
        return self.folder / f"{digest}-{shard.size}"

    def open(self, shard: Shard) -> Descriptor | None:
        """Opens the complete shard, kept from eviction while the descriptor exists; None where it is not cached."""
        with self._disk():
            try:
                file = Descriptor(self.path(shard))
            except FileNotFoundError:
                return None
            file.lock(fcntl.LOCK_SH)
            now = os.fstat(file.number)
            if now.st_nlink == 0:  # evicted between the two calls
                return None
            if now.st_size != shard.size:  # something else than this program has changed it
                self.path(shard).unlink(missing_ok=True)
                return None
            if time.time() - now.st_mtime > TOUCH_SECONDS:
                os.utime(file.number)
            return file

    def reserve(self, shard: Shard, force: bool) -> Descriptor | None:
        """Returns an empty part for the shard, locked by this process; None while another one writes it, or just has.

        Raises:
            CacheFull: nothing may be evicted that would make room. With `force` that is only so where the parts of
                others take it all: of the shards that are being read or wanted next, the longest unused lose
                their names; open descriptors stay readable.
        """
        if shard.size > self.limit:
            raise DataError(
                f"{shard} has {shard.size / 1e9:.2f} GB, more than data.cache_gb {self.limit / 1e9:g}: raise it"
            )
        path = self.path(shard)
        with self._disk(), self._folder_lock():
            self._clear()
            if path.exists() or _part(path).exists():
                return None
            if not self._make_room(shard.size, force):
                raise CacheFull
            part = Descriptor(_part(path), os.O_RDWR | os.O_CREAT | os.O_EXCL)
            part.lock(fcntl.LOCK_EX)
            return part

    def write(self, part: Descriptor, data: bytes) -> None:
        """Append to a part. A full disk evicts the least recently used shards."""
        rest = memoryview(data)
        while rest:
            with self._disk():
                try:
                    rest = rest[os.write(part.number, rest) :]
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._evict(len(rest)):
                        raise

    def restart(self, part: Descriptor) -> None:
        """Empty a part."""
        with self._disk():
            os.ftruncate(part.number, 0)
            os.lseek(part.number, 0, os.SEEK_SET)

    def bytes_received(self, shard: Shard) -> int:
        """Returns the bytes of the shard's part, whichever process writes it; 0 where there is none."""
        try:
            return _part(self.path(shard)).stat().st_size
        except FileNotFoundError:
            return 0

    def commit(self, shard: Shard, part: Descriptor) -> Descriptor:
        """Rename a complete part to the shard; it is kept from eviction while the descriptor exists."""
        with self._disk():
            os.fsync(part.number)
            with self._folder_lock():  # the kernel changes a lock by releasing it for a moment
                _part(self.path(shard)).rename(self.path(shard))
                part.lock(fcntl.LOCK_SH)
        return part

    def discard(self, shard: Shard, part: Descriptor) -> None:
        """Remove a part that this process has reserved."""
        with self._disk():
            if os.fstat(part.number).st_nlink:
                _part(self.path(shard)).unlink()

    def forget(self, shard: Shard) -> None:
        """Remove a complete shard that is damaged."""
        with self._disk():
            self.path(shard).unlink(missing_ok=True)

    def _clear(self) -> None:
        """Remove the parts that no process writes any more. The folder is locked."""
        for path in self._files():
            if path.suffix == PART:
                _unlink(path)

    def _evict(self, size: int) -> bool:
        """Evict, least recently used first, to free `size` bytes of the disk; returns whether anything was removed."""
        with self._folder_lock():
            files = self._files()
            held = sum(_bytes(path) for path in files)
            self._remove(files, held, max(0, held - size), force=True)
            return len(self._files()) < len(files)

    def _make_room(self, size: int, force: bool) -> bool:
        """Whether `size` more bytes now fit under the limit. The folder is locked."""
        files = self._files()
        return self._remove(files, sum(_bytes(path) for path in files), self.limit - size, force) <= self.limit - size

    def _remove(self, files: list[Path], held: int, goal: int, force: bool) -> int:
        """Remove complete shards until no more than `goal` of the `held` bytes are left; returns what is left."""
        complete = [path for path in files if path.suffix != PART]
        for forced in (False, True)[: 1 + force]:
            for path in complete:
                if held <= goal:
                    return held
                if _unlink(path, forced):
                    held -= _bytes(path)
                    if forced:
                        self._warn()
        return held

    def _warn(self) -> None:
        if time.monotonic() - self._warned >= LOG_SECONDS:
            self._warned = time.monotonic()
            log.warning(
                "cache folder '%s' of %g GB is too small for the shards in use; shards are being downloaded again and "
                "again: free disk space, raise data.cache_gb or lower data.prefetch",
                self.folder,
                self.limit / 1e9,
            )

    def _files(self) -> list[Path]:
        """Returns shards and parts, the least recently used first."""
        with os.scandir(self.folder) as entries:
            ages = [(entry.stat().st_mtime_ns, entry.name) for entry in entries if NAME.fullmatch(entry.name)]
        return [self.folder / name for _, name in sorted(ages)]

    @contextmanager
    def _folder_lock(self) -> Iterator[None]:
        """Hold the folder's lock: no other process or thread reserves, clears or evicts."""
        folder = Descriptor(self.folder, os.O_DIRECTORY)
        folder.lock(fcntl.LOCK_EX)
        try:
            yield
        finally:
            folder.lock(fcntl.LOCK_UN)  # at once, even if a fork has copied the descriptor

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"cache folder '{self.folder}' cannot be used ({error.strerror}): free space, lower data.cache_gb or "
                "set data.cache to another directory"
            ) from error


def _part(path: Path) -> Path:
    return path.with_name(path.name + PART)


def _bytes(path: Path) -> int:
    """Returns the bytes of a shard, or of a part once complete, from its name."""
    return int(path.name.removesuffix(PART).rpartition("-")[2])


def _unlink(path: Path, force: bool = False) -> bool:
    """Remove a file, one that is locked only by `force`; returns whether it was removed. The folder is locked."""
    try:
        file = Descriptor(path)
    except FileNotFoundError:
        return False
    if not force and not file.lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
        return False
    path.unlink()
    return True
