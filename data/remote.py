"""Shards that lie in a store (s3, gs, hf, https …): how it is opened, what its failures mean, when to try again."""

import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.spec import AbstractBufferedFile

from mug.data.errors import DataError

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0  # without a byte: a transfer that stalls is cut, and tried again
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two tries
GRACE_SECONDS = CONNECT_SECONDS + READ_SECONDS  # for who waits for another's transfer, to hear from it first
LOG_SECONDS = 60.0  # a shard's trouble is logged once in so many
EXTRAS = {"s3": "s3", "gs": "gs", "http": "http", "https": "http"}  # scheme → extra of this package that serves it

Result = TypeVar("Result")
log = logging.getLogger("mug")


def is_remote(url: str) -> bool:
    """Whether this is a URL and no path on this machine."""
    return "://" in url


def shown(url: str) -> str:
    """The URL as a message may show it: without a password or a query, which can be a secret."""
    if not is_remote(url):
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def reason(error: BaseException) -> str:
    """One line of an error that a message may show."""
    line = (str(error).splitlines() or [""])[0]
    line = re.sub(r"(?<=://)[^/@\s]*@|\?[^\s'\"]*", "", line)
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__


@dataclass(frozen=True)
class Shard:
    """One shard as the index knows it. size: bytes. etag: the store's mark of its content, or empty."""

    url: str
    size: int
    etag: str

    def __str__(self) -> str:
        return f"shard '{shown(self.url)}'"

    def changed(self, what: str) -> DataError:
        """The error of a shard that is not the one that was indexed."""
        return DataError(f"{self}: {what}, so it changed since it was indexed: run index_shards again")

    def check(self, info: Mapping) -> None:
        """Compare what the store says about the shard (fsspec's `info`) with the index.

        Raises:
            DataError: another size or ETag.
        """
        if info.get("size") not in (None, self.size):
            raise self.changed(f"it has {info['size']:,} bytes, the index says {self.size:,}")
        if self.etag and etag_of(info) and _bare(etag_of(info)) != _bare(self.etag):
            raise self.changed(f"its ETag is {etag_of(info)}, the index says {self.etag}")


def etag_of(info: Mapping) -> str:
    """The store's mark of a file's content, from fsspec's `info`; empty where it gives none."""
    return next((str(info[name]) for name in ("ETag", "etag", "blob_id") if info.get(name)), "")


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


class Stores:
    """The file systems of one process, one per scheme and account. They must not be carried over a fork."""

    def __init__(self):
        self._stores: dict[str, fsspec.AbstractFileSystem] = {}
        self._lock = Lock()

    def open(self, shard: Shard, **options: object) -> tuple[AbstractBufferedFile, str]:
        """The shard, open for reading without a buffer, and its ETag; empty where the store gives none.

        Raises:
            DataError: the shard is not the one that was indexed, or a package is missing. Else what the store raises.
        """
        store, path = self._of(shard)
        info = store.info(path)
        shard.check(info)
        etag = etag_of(info)
        if etag.startswith('"') and shard.url.startswith("http"):  # s3fs does so by itself; no rule for weak ones
            options["headers"] = {"If-Match": etag}
        return store.open(path, "rb", cache_type="none", **options), etag

    def etag(self, shard: Shard) -> str:
        """The shard's ETag now; empty where the store gives none."""
        store, path = self._of(shard)
        return etag_of(store.info(path))

    def _of(self, shard: Shard) -> tuple[fsspec.AbstractFileSystem, str]:
        """The file system of a shard, and the shard's path in it."""
        scheme = shard.url.partition("://")[0]
        try:
            kind = fsspec.get_filesystem_class(scheme)
            options = kind._get_kwargs_from_urls(shard.url) | _limits(scheme)
        except ImportError as error:
            mend = f"pip install -e '.[{EXTRAS[scheme]}]'" if scheme in EXTRAS else "install it"
            raise DataError(f"{shard}: a package for {scheme}:// is missing ({reason(error)}): {mend}") from error
        with self._lock:
            key = f"{scheme} {options}"
            if key not in self._stores:
                self._stores[key] = kind(skip_instance_cache=True, **options)
                if scheme == "s3":
                    self._stores[key].retries = 1  # ours is the one place that tries again
            return self._stores[key], kind._strip_protocol(shard.url)


def _limits(scheme: str) -> dict:
    """Options that cut a stalled transfer, beside those of the user's fsspec configuration."""
    if scheme == "s3":
        mine = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "retries": {"total_max_attempts": 1}}
        return {"config_kwargs": fsspec.config.conf.get("s3", {}).get("config_kwargs", {}) | mine}
    if scheme in ("http", "https"):
        import aiohttp

        return {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)}
    return {}


def _answer(error: BaseException) -> tuple[int | None, Mapping[str, str]]:
    """HTTP status and headers of the answer that an error, or what caused it, speaks of; None where it had none."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            meta = response.get("ResponseMetadata", {})
            return meta.get("HTTPStatusCode"), meta.get("HTTPHeaders", {})
        for said, of in ((cause, "status"), (response, "status_code"), (cause, "code")):  # aiohttp, httpx, gcsfs
            if isinstance(getattr(said, of, None), int):
                return getattr(said, of), getattr(said, "headers", None) or {}
        cause = cause.__cause__
    return None, {}


def _permanent(shard: Shard, error: Exception) -> DataError | None:
    """What to say of an error that another try cannot mend; None where it can."""
    status, _ = _answer(error)
    if status in (412, 416):
        return shard.changed("the store no longer has that version of it")
    # fsspec's http calls all that goes wrong with a first request "not found", and keeps the true cause
    missing = status is None and isinstance(error, FileNotFoundError) and error.__cause__ is None
    if status in (404, 410) or missing:
        return DataError(f"{shard} does not exist: restore it, or correct the path and run index_shards again")
    if status in (401, 403) or (status is None and isinstance(error, PermissionError)):
        return DataError(f"{shard}: access is denied ({status or reason(error)}): check your credentials or its mode")
    if "Credentials" in type(error).__name__:
        return DataError(f"{shard}: no credentials for its store ({reason(error)}): set them")
    return None


def _retry_after(error: Exception) -> float:
    """Seconds that the server asks to wait; 0 where it does not say, or names a date."""
    _, headers = _answer(error)
    asked = next((value for name, value in headers.items() if name.lower() == "retry-after"), "")
    return float(asked) if asked.isdecimal() else 0.0


@dataclass
class Patience:
    """How long one shard is tried: `seconds` since it last came further than ever before.

    logged: shard → time of its last warning, shared by the shards of a process.
    """

    shard: Shard
    seconds: float
    logged: dict[Shard, float]
    tries: int = 0
    furthest: int = -1
    since: float = field(default_factory=time.monotonic)
    trouble: str = "no byte arrived"

    def progress(self, done: int) -> None:
        """Take note that `done` bytes of the shard are there."""
        if done > self.furthest:
            self.furthest, self.since, self.tries = done, time.monotonic(), 0

    def check(self, grace: float = 0.0) -> None:
        """Raises DataError when the time, and `grace` seconds more, are up."""
        if time.monotonic() - self.since >= self.seconds + grace:
            raise DataError(
                f"{self.shard}: gave up after {self.seconds:g} s without progress ({self.trouble}): "
                "check the network and the store, or raise data.retry_seconds"
            )

    def after(self, error: Exception) -> None:
        """Pause before the next try.

        Raises:
            DataError: the error is permanent, or the time is up.
        """
        permanent = _permanent(self.shard, error)
        if permanent:
            raise permanent from error
        self.trouble = reason(error)
        self.check()
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self.tries) * random.SystemRandom().uniform(0.5, 1.0)
        self.tries += 1
        now = time.monotonic()
        if now - self.logged.get(self.shard, -LOG_SECONDS) >= LOG_SECONDS:
            self.logged[self.shard] = now
            log.warning("%s: %s; trying again for up to %.0f s", self.shard, self.trouble, self.seconds)
        time.sleep(max(0.0, min(max(pause, _retry_after(error)), self.since + self.seconds - now)))

    def persist(self, attempt: Callable[[], Result]) -> Result:
        """The result of the first attempt that succeeds.

        Raises:
            DataError: of `attempt` itself, or when there is no sense in another one.
        """
        while True:
            try:
                return attempt()
            except DataError:
                raise
            except Exception as error:  # every store has its own kinds of failure
                self.after(error)
