"""The bytes of the shards, wherever they lie: on this machine, or in a store, through a cache or range by range.

Local shards are read by pread on files that are kept open, not by a memory map. A map was 15 microseconds faster for
40 kB, a hundredth of what their decoding takes; but where a file shrinks it ends the process and pread is an error
like others, and it asks a network file system for page after page instead of once.
"""

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from fsspec.spec import AbstractBufferedFile

from mug.data.config import FetchConfig
from mug.data.errors import DataError
from mug.data.store.disk_cache import CacheFull, Descriptor, DiskCache
from mug.data.store.identity import Identity
from mug.data.store.remote import GRACE_SECONDS, RetryPolicy, Shard, Stores, is_remote

PIECE = 16 * 2**20  # bytes of one request for a complete shard
OPEN_LOCAL, OPEN_REMOTE = 512, 2048  # files kept open; a remote one holds no connection
Result = TypeVar("Result")
Version = tuple[int, int, int]  # of a file on this machine: size, time of change, inode

POLL_SECONDS = 0.2  # between two looks at what another process does


class Fetch:
    """Reads shards by number. Cheap to pickle: each process opens files of its own.

    urls: paths or URLs [S]. sizes: bytes [S]. etags: [S], a store's mark of the content; empty where it gives none.
    cache: the folder for complete remote shards; needed only by remote shards where `config.remote` is 'cache'.
    identity: compares each shard that is opened with the index; without it, size and ETag alone are compared.

    Raises:
        DataError: from every method, when a shard is missing, is not the one that was indexed, cannot be read within
            `config.retry_seconds`, or the cache folder cannot be used. It names the shard or the folder.
    """

    def __init__(
        self,
        urls: Sequence[str],
        sizes: Sequence[int],
        etags: Sequence[str],
        cache: Path | None,
        config: FetchConfig,
        identity: Identity | None = None,
    ):
        self._urls, self._sizes, self._etags = urls, sizes, etags
        self._identity = identity
        self._cache = cache
        self._config = config
        self._opened: _Opened | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": None}

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Returns `length` bytes of a shard, from `offset`. Waits for a remote shard that is not there yet."""
        which = self._shard(shard)
        data = self._reader(which).read(which, offset, length)
        if len(data) != length:
            raise which.changed(f"it ends before byte {offset + length:,}")
        return data

    def local(self, shard: int) -> Path:
        """Returns the path of a file on this machine that holds the complete shard.

        A remote shard's file stays until the next call that is for another one: open it before.
        """
        which = self._shard(shard)
        return self._reader(which).local(which)

    def ahead(self, shards: Sequence[int], read: Callable[[int], Result]) -> Iterator[Callable[[], Result]]:
        """Yields for each i a function that returns `read(i)`, which reads from `shards[i]`; called in that order.

        What lies in a store is prefetched, `config.prefetch` at a time: complete shards, or by ranges as many reads.
        """
        remote = any(is_remote(self._urls[shard]) for shard in shards)
        if remote and self._config.prefetch and isinstance(reader := self._here().remote, _Ranged):
            yield from reader.ahead(range(len(shards)), read)
            return
        for i in range(len(shards)):
            if remote:
                self.prefetch(list(dict.fromkeys(shards[i:])))
            yield partial(read, i)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Set which shards come next, in this order, instead of those set before.

        The first `config.prefetch` of them are fetched in the background, and are not evicted before the next call.
        Their errors wait for the read that needs them.
        """
        which = [self._shard(shard) for shard in shards[: self._config.prefetch]]
        self._here().remote.prefetch([shard for shard in which if is_remote(shard.url)])

    def changed(self, shard: int, what: str) -> DataError:
        """Returns the error of a shard that is not the one that was indexed."""
        return self._shard(shard).changed(what)

    def _shard(self, shard: int) -> Shard:
        place = self._urls[shard], int(self._sizes[shard]), self._etags[shard]
        if self._identity is None:
            return Shard(*place)
        return Shard(*place, self._identity.index.digests[shard], partial(self._identity.differs, shard))

    def _reader(self, shard: Shard) -> "_Local | _Cached | _Ranged":
        return self._here().remote if is_remote(shard.url) else self._here().local

    def _here(self) -> "_Opened":
        """Returns what this process has opened; a fork must not use its parent's locks and connections."""
        if self._opened is None or self._opened.process != os.getpid():
            self._opened = _Opened(self._cache, self._config)
        return self._opened


class _Opened:
    """What one process holds open."""

    def __init__(self, cache: Path | None, config: FetchConfig):
        logged: dict[Shard, float] = {}

        def retry_policy(shard: Shard) -> RetryPolicy:
            return RetryPolicy(shard, config.retry_seconds, logged)

        self.process = os.getpid()
        self.local = _Local(retry_policy)
        self.remote = (
            _Ranged(retry_policy, config.prefetch)
            if config.remote == "ranged"
            else _Cached(cache, config, retry_policy)
        )


def _version(found: os.stat_result) -> Version:
    return found.st_size, found.st_mtime_ns, found.st_ino


class _Local:
    """Shards on this machine's file systems."""

    def __init__(self, retry_policy: Callable[[Shard], RetryPolicy]):
        self._retry_policy = retry_policy
        self._files: OrderedDict[Shard, tuple[Descriptor, Version]] = OrderedDict()  # the longest unused first
        self._lock = threading.Lock()

    def read(self, shard: Shard, offset: int, length: int) -> bytes:
        def attempt() -> bytes:
            try:
                return self._open(shard).read(offset, length)
            except OSError:  # a network file system's handle may be stale: the next attempt reopens it
                with self._lock:
                    self._files.pop(shard, None)
                raise

        return self._retry_policy(shard).retry(attempt)

    def local(self, shard: Shard) -> Path:
        def attempt() -> None:
            if _version(os.stat(shard.url)) != _version(os.fstat(self._open(shard).number)):  # another one is there now
                with self._lock:
                    self._files.pop(shard, None)
                self._open(shard)

        self._retry_policy(shard).retry(attempt)
        return Path(shard.url)

    def _open(self, shard: Shard) -> Descriptor:
        """Returns the shard's file, compared with the index when opened and when it was written to since."""
        with self._lock:
            file, version = self._files.get(shard, (None, None))
            if file is None or _version(os.fstat(file.number)) != version:
                self._files.pop(shard, None)
                file = Descriptor(shard.url)
                version = _version(os.fstat(file.number))
                shard.check({"size": version[0]})
                shard.prove(file.read, Path(shard.url))
                self._files[shard] = file, version
            self._files.move_to_end(shard)
            if len(self._files) > OPEN_LOCAL:
                self._files.popitem(last=False)
            return file


def _read_range(shard: Shard, file: AbstractBufferedFile, offset: int, length: int) -> bytes:
    try:
        file.seek(offset)
        return file.read(length)
    except ValueError as error:
        raise DataError(f"{shard}: its server sends only complete files: set data.remote to cache") from error


class _Ranged:
    """Remote shards, of which each read asks the store for its bytes."""

    def __init__(self, retry_policy: Callable[[Shard], RetryPolicy], at_a_time: int):
        self._retry_policy = retry_policy
        self._at_a_time = at_a_time
        self._stores = Stores()
        self._files: OrderedDict[Shard, AbstractBufferedFile] = OrderedDict()  # the longest unused first
        self._proven: set[Shard] = set()
        self._lock = threading.Lock()

    def read(self, shard: Shard, offset: int, length: int) -> bytes:
        return self._retry_policy(shard).retry(lambda: self._attempt(shard, offset, length))

    def _attempt(self, shard: Shard, offset: int, length: int) -> bytes:
        with self._lock:
            file = self._files.pop(shard, None)  # it has one position, so one reader; put back only after success
        file = file or self._open(shard)
        data = _read_range(shard, file, offset, length)
        if len(data) != length and offset + length <= shard.size:
            raise EOFError(f"{len(data):,} of {length:,} bytes")
        with self._lock:
            self._files[shard] = file
            if len(self._files) > OPEN_REMOTE:
                self._files.popitem(last=False)
        return data

    def _open(self, shard: Shard) -> AbstractBufferedFile:
        file = self._stores.open(shard)[0]
        if shard not in self._proven:
            shard.prove(lambda offset, length: _read_range(shard, file, offset, length), None)
            self._proven.add(shard)
        return file

    def ahead(self, places: Iterable[int], read: Callable[[int], Result]) -> Iterator[Callable[[], Result]]:
        with ThreadPoolExecutor(self._at_a_time) as pool:
            waiting = deque()
            try:
                for i in places:
                    waiting.append(pool.submit(read, i))
                    if len(waiting) > self._at_a_time:
                        yield waiting.popleft().result
                while waiting:
                    yield waiting.popleft().result
            finally:  # also where the caller stops early
                pool.shutdown(wait=False, cancel_futures=True)

    def local(self, shard: Shard) -> Path:
        raise DataError(f"{shard} has a format that is read as a unit: set data.remote to cache")

    def prefetch(self, shards: Sequence[Shard]) -> None:
        pass  # nothing is kept


class _Transfer:
    """The transfer of a shard into the cache."""

    def __init__(self, retry_policy: RetryPolicy):
        self.retry_policy = retry_policy
        self.needed = False  # a reader waits for it
        self.file: Future[Descriptor] = Future()
        self.version = ""  # ETag of the bytes that have arrived
        self.complete_only = False  # its server knows no ranges


class _Cached:
    """Remote shards, fetched into the cache as complete files by one daemon thread each."""

    def __init__(self, folder: Path | None, config: FetchConfig, retry_policy: Callable[[Shard], RetryPolicy]):
        self._folder = folder
        self._config = config
        self._retry_policy = retry_policy
        self._stores = Stores()
        self._lock = threading.RLock()
        self._disk: DiskCache | None = None
        self._wanted: list[Shard] = []
        self._proven: set[Shard] = set()  # files in the cache never change
        self._held: dict[Shard, Descriptor] = {}  # those of the wanted that are there
        self._handed: Descriptor | None = None  # the last that `local` named
        self._transfers: dict[Shard, _Transfer] = {}  # those under way, and those that failed until a reader asks

    def read(self, shard: Shard, offset: int, length: int) -> bytes:
        return self._get(shard).read(offset, length)

    def local(self, shard: Shard) -> Path:
        self._handed = self._get(shard)
        return self._cache().path(shard)

    def prefetch(self, shards: Sequence[Shard]) -> None:
        with self._lock:
            self._wanted = list(shards)
            self._held = {shard: file for shard, file in self._held.items() if shard in self._wanted}
        self._go_on()

    def _cache(self) -> DiskCache:
        with self._lock:
            if self._disk is None:
                if self._folder is None:
                    raise DataError("remote shards need a cache folder: set data.cache, or data.remote to ranged")
                self._disk = DiskCache(self._folder, int(self._config.cache_gb * 1e9))
            return self._disk

    def _get(self, shard: Shard) -> Descriptor:
        """Returns the complete shard, fetched now if need be."""
        while (file := self._cache().open(shard)) is None:
            transfer = self._start(shard, needed=True)
            while not wait([transfer.file], timeout=1.0).done:
                transfer.retry_policy.check(GRACE_SECONDS)  # whatever its thread may hang in
            with self._lock:
                if self._transfers.get(shard) is transfer:
                    del self._transfers[shard]
            try:
                file = transfer.file.result()
                break
            except CacheFull:  # nobody needed it then
                continue
        if shard not in self._proven:
            try:
                shard.prove(file.read, self._cache().path(shard))
            except DataError:
                self._cache().forget(shard)
                raise
            self._proven.add(shard)
        return file

    def _go_on(self) -> None:
        """Start what is wanted, up to `ahead` at a time, and hold what is there."""
        with self._lock:
            for shard in self._wanted:
                if shard in self._held or shard in self._transfers:
                    continue
                file = self._cache().open(shard)
                if file is not None:
                    self._held[shard] = file
                elif sum(not one.file.done() for one in self._transfers.values()) < self._config.prefetch:
                    self._start(shard, needed=False)

    def _start(self, shard: Shard, needed: bool) -> _Transfer:
        with self._lock:
            transfer = self._transfers.get(shard)
            if transfer is None:
                transfer = self._transfers[shard] = _Transfer(self._retry_policy(shard))
                transfer.needed = needed
                threading.Thread(target=self._run, args=(shard, transfer), daemon=True, name=str(shard)).start()
            transfer.needed |= needed
            return transfer

    def _run(self, shard: Shard, transfer: _Transfer) -> None:
        """Run a transfer: the target of its thread."""
        try:
            file = self._fetch_or_wait(shard, transfer)
        except BaseException as error:  # the reader that needs the shard raises it
            with self._lock:
                if isinstance(error, CacheFull):  # until the next `prefetch`, or a reader
                    self._wanted = [one for one in self._wanted if one != shard]
                    del self._transfers[shard]
            transfer.file.set_exception(error)
        else:
            with self._lock:
                del self._transfers[shard]
                if shard in self._wanted:
                    self._held[shard] = file
            transfer.file.set_result(file)
        with suppress(DataError):  # a read will raise it
            self._go_on()

    def _fetch_or_wait(self, shard: Shard, transfer: _Transfer) -> Descriptor:
        """Fetch the shard, or wait for the process that does."""
        cache = self._cache()
        while (file := cache.open(shard)) is None:
            try:
                part = cache.reserve(shard, force=transfer.needed)
            except CacheFull:
                if not transfer.needed:
                    raise
                part, transfer.retry_policy.trouble = None, "other transfers fill data.cache_gb"
            if part is not None:
                return self._fetch(shard, transfer, part)
            transfer.retry_policy.progress(cache.bytes_received(shard))
            transfer.retry_policy.check(GRACE_SECONDS)
            time.sleep(POLL_SECONDS)
        return file

    def _fetch(self, shard: Shard, transfer: _Transfer, part: Descriptor) -> Descriptor:
        try:
            transfer.retry_policy.retry(lambda: self._fill(shard, transfer, part))
            return self._cache().commit(shard, part)
        except BaseException:
            self._cache().discard(shard, part)
            raise

    def _fill(self, shard: Shard, transfer: _Transfer, part: Descriptor) -> None:
        """Do one attempt: resume from the bytes that are there, if the store still has that version."""
        file, version = self._stores.open(shard, **({"block_size": 0} if transfer.complete_only else {}))
        if transfer.complete_only or not version or version != transfer.version:
            self._cache().restart(part)
            transfer.version = version
        done = os.fstat(part.number).st_size
        with file:
            try:
                file.seek(done)
                while done < shard.size:
                    data = file.read(min(PIECE, shard.size - done))
                    if not data:
                        raise EOFError(f"{done:,} of {shard.size:,} bytes")
                    self._cache().write(part, data)
                    done += len(data)
                    transfer.retry_policy.progress(done)
            except ValueError:
                transfer.complete_only = True
                raise
        if self._stores.etag(shard) != version:
            raise shard.changed("it changed while it was read")
