"""Whole shards on this machine's disk, shared by all its processes and bounded in bytes.

In the folder, NAME is a whole shard and NAME.part one that is on its way. Who writes a part holds its lock, who
reads a whole shard or wants it next holds a share of its lock, and who changes the list of names holds the folder's.
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
from mug.data.remote import LOG_SECONDS, Shard

PART = ".part"
NAME = re.compile(r"[0-9a-f]{32}-[0-9]+(\.part)?")
TOUCH_SECONDS = 5.0  # how exactly the order of use is known

log = logging.getLogger("mug")


class Descriptor:
    """A file descriptor that closes with its last reference, so that no thread closes what another reads."""

    def __init__(self, path: Path | str, flags: int = os.O_RDONLY):
        self.number = os.open(path, flags | os.O_CLOEXEC, 0o644)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.number, length, offset)  # a caller that took the number alone might let go of the file

    def lock(self, kind: int) -> bool:
        """flock; False where LOCK_NB is in `kind` and another holds the lock."""
        try:
            fcntl.flock(self.number, kind)
        except BlockingIOError:
            return False
        return True


class NoRoom(Exception):
    """The cache is full of shards that are on their way, being read or wanted next."""


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
            with self._alone():
                self._clear()

    def path(self, shard: Shard) -> Path:
        """Where the whole shard is, or would be. Another size or ETag has another name."""
        digest = hashlib.sha256(f"{shard.url}\n{shard.etag}".encode()).hexdigest()[:32]
        return self.folder / f"{digest}-{shard.size}"

    def open(self, shard: Shard) -> Descriptor | None:
        """The whole shard, kept from eviction while the descriptor lives; None where it is not in the cache."""
        with self._disk():
            try:
                file = Descriptor(self.path(shard))
            except FileNotFoundError:
                return None
            file.lock(fcntl.LOCK_SH)
            now = os.fstat(file.number)
            if now.st_nlink == 0:  # evicted between the two calls
                return None
            if now.st_size != shard.size:  # something else than this program has been at it
                self.path(shard).unlink(missing_ok=True)
                return None
            if time.time() - now.st_mtime > TOUCH_SECONDS:
                os.utime(file.number)
            return file

    def claim(self, shard: Shard, force: bool) -> Descriptor | None:
        """An empty part for the shard, locked by this process; None while another one writes it, or has just done so.

        Raises:
            NoRoom: nothing may be evicted that would make room. With `force` that is only so where the parts of
                others take it all: of the shards that are being read or wanted next, the longest unused lose
                their names, and who has them open reads on.
        """
        if shard.size > self.limit:
            raise DataError(
                f"{shard} has {shard.size / 1e9:.2f} GB, more than data.cache_gb {self.limit / 1e9:g}: raise it"
            )
        path = self.path(shard)
        with self._disk(), self._alone():
            self._clear()
            if path.exists() or _part(path).exists():
                return None
            if not self._make_room(shard.size, force):
                raise NoRoom
            part = Descriptor(_part(path), os.O_RDWR | os.O_CREAT | os.O_EXCL)
            part.lock(fcntl.LOCK_EX)
            return part

    def write(self, part: Descriptor, data: bytes) -> None:
        """Append to a part. A full disk costs the longest unused shards."""
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

    def arrived(self, shard: Shard) -> int:
        """Bytes of the shard's part, whoever writes it; 0 where there is none."""
        try:
            return _part(self.path(shard)).stat().st_size
        except FileNotFoundError:
            return 0

    def commit(self, shard: Shard, part: Descriptor) -> Descriptor:
        """Make a full part the whole shard; it is kept from eviction while the descriptor lives."""
        with self._disk():
            os.fsync(part.number)
            with self._alone():  # to the kernel a change of lock is a moment without one
                _part(self.path(shard)).rename(self.path(shard))
                part.lock(fcntl.LOCK_SH)
        return part

    def abandon(self, shard: Shard, part: Descriptor) -> None:
        """Remove a part that this process has claimed."""
        with self._disk():
            if os.fstat(part.number).st_nlink:
                _part(self.path(shard)).unlink()

    def _clear(self) -> None:
        """Remove the parts that nobody writes any more. The folder is locked."""
        for path in self._files():
            if path.suffix == PART:
                _unlink(path)

    def _evict(self, size: int) -> bool:
        """Whether anything was removed, longest unused first, to free `size` bytes of the disk."""
        with self._alone():
            files = self._files()
            held = sum(_bytes(path) for path in files)
            self._remove(files, held, max(0, held - size), force=True)
            return len(self._files()) < len(files)

    def _make_room(self, size: int, force: bool) -> bool:
        """Whether `size` more bytes now fit under the limit. The folder is locked."""
        files = self._files()
        return self._remove(files, sum(_bytes(path) for path in files), self.limit - size, force) <= self.limit - size

    def _remove(self, files: list[Path], held: int, goal: int, force: bool) -> int:
        """Remove whole shards until no more than `goal` of the `held` bytes are left; what is left is returned."""
        whole = [path for path in files if path.suffix != PART]
        for forced in (False, True)[: 1 + force]:
            for path in whole:
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
                "cache folder '%s': %g GB are too few for the shards in use at one time, so some are fetched again "
                "and again: make room, raise data.cache_gb or lower data.ahead",
                self.folder,
                self.limit / 1e9,
            )

    def _files(self) -> list[Path]:
        """Shards and parts, the longest unused first."""
        with os.scandir(self.folder) as entries:
            ages = [(entry.stat().st_mtime_ns, entry.name) for entry in entries if NAME.fullmatch(entry.name)]
        return [self.folder / name for _, name in sorted(ages)]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder's lock: no other process or thread claims, clears or evicts."""
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
                f"cache folder '{self.folder}' cannot be used ({error.strerror}): make room, lower data.cache_gb or "
                "set data.cache to another folder"
            ) from error


def _part(path: Path) -> Path:
    return path.with_name(path.name + PART)


def _bytes(path: Path) -> int:
    """Bytes of a shard, or of a part when it will be whole: its name says it."""
    return int(path.name.removesuffix(PART).rpartition("-")[2])


def _unlink(path: Path, force: bool = False) -> bool:
    """Remove a file, one that is locked only by `force`; whether it was removed. The folder is locked."""
    try:
        file = Descriptor(path)
    except FileNotFoundError:
        return False
    if not force and not file.lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
        return False
    path.unlink()
    return True
