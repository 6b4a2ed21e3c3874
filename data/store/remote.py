"""Shards that lie in a store (s3, gs, hf, https …): how it is opened, what its failures mean, when to retry."""

import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import fsspec
from fsspec.spec import AbstractBufferedFile

from mug.data.errors import DataError

CONNECT_SECONDS = 10.0
INDEX_SECONDS = 60.0  # without progress on a shard that is indexed
READ_SECONDS = 30.0  # without a byte: a transfer that stalls is cut, and retried
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts
GRACE_SECONDS = CONNECT_SECONDS + READ_SECONDS  # so that a waiter learns of another's transfer first
LOG_SECONDS = 60.0  # a shard's failures are logged once in so many
EXTRAS = {"s3": "s3", "gs": "gs", "http": "http", "https": "http"}  # scheme → extra of this package that serves it

Result = TypeVar("Result")
Read = Callable[[int, int], bytes]  # (offset, length) → that many bytes
Differs = Callable[[Read, Path | None], str]  # (reader, path on this machine) → how it differs
log = logging.getLogger("mug")


def is_remote(url: str) -> bool:
    """Whether this is a URL and not a path on this machine."""
    return "://" in url


def unsigned(url: str) -> str:
    """Returns the URL without a password or a query, which can be a secret; a path as it is."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    host, slash, path = rest.partition("/")
    path, _, query = path.partition("?")
    if query and "=" not in query and not scheme.startswith("http"):  # a store's file whose name holds this sign
        path += f"?{query}"
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def redact_url(url: str) -> str:
    """Returns the path or URL as a message may show it."""
    return unsigned(url)


def summarize(error: BaseException) -> str:
    """Returns one line of an error that a message may show."""
    line = (str(error).splitlines() or [""])[0]
    line = re.sub(r"(?<=://)[^/@\s]*@|\?[^\s'\"]*", "", line)
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__


@dataclass(frozen=True)
class Shard:
    """One shard as the index knows it. size: bytes. etag: the store's mark of its content, or empty.

    mark: what else distinguishes shards of one URL and size. differs: see `mug.data.store.identity.Identity`.
    """

    url: str
    size: int
    etag: str
    mark: str = ""
    differs: Differs = field(default=lambda read, path: "", compare=False)

    def __str__(self) -> str:
        return f"shard '{redact_url(self.url)}'"

    def changed(self, what: str) -> DataError:
        """Returns the error of a shard that is not the one that was indexed."""
        return DataError(f"{self}: {what}, so it changed since it was indexed: rerun index_shards")

    def prove(self, read: Read, path: Path | None) -> None:
        """Compare what has been opened with the index.

        Raises:
            DataError: it differs.
        """
        if how := self.differs(read, path):
            raise self.changed(how)

    def check(self, info: Mapping) -> None:
        """Compare the store's metadata of the shard (fsspec's `info`) with the index.

        Raises:
            DataError: another size or ETag.
        """
        if info.get("size") not in (None, self.size):
            raise self.changed(f"it has {info['size']:,} bytes, but {self.size:,} in the index")
        if self.etag and etag_of(info) and _bare(etag_of(info)) != _bare(self.etag):
            raise self.changed(f"its ETag is {etag_of(info)}, but {self.etag} in the index")


def etag_of(info: Mapping) -> str:
    """Returns the store's mark of a file's content, from fsspec's `info`; empty where it gives none."""
    return next((str(info[name]) for name in ("ETag", "etag", "blob_id") if info.get(name)), "")


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


class Stores:
    """The file systems of one process, one per scheme and account. They must not be carried over a fork."""

    def __init__(self):
        self._stores: dict[str, Any] = {}
        self._lock = Lock()

    def open(self, shard: Shard, **options: object) -> tuple[AbstractBufferedFile, str]:
        """Opens the shard for reading without a buffer; returns it with its ETag, empty where the store gives none.

        Raises:
            DataError: the shard is not the one that was indexed, or a package is missing. Else what the store raises.
        """
        store, path = self.of(shard)
        info = store.info(path)
        shard.check(info)
        etag = etag_of(info)
        if etag.startswith('"') and shard.url.startswith("http"):  # s3fs does so by itself; no rule for weak ones
            options["headers"] = {"If-Match": etag}
        return store.open(path, "rb", cache_type="none", **options), etag

    def etag(self, shard: Shard) -> str:
        """Returns the shard's current ETag; empty where the store gives none."""
        store, path = self.of(shard)
        return etag_of(store.info(path))

    def of(self, shard: Shard) -> tuple[Any, str]:
        """Returns the file system of a shard, and the shard's path in it.

        Raises:
            DataError: a package is missing.
        """
        scheme = shard.url.partition("://")[0]
        try:
            kind = fsspec.get_filesystem_class(scheme)
            options = kind._get_kwargs_from_urls(shard.url) | _limits(scheme)
        except ImportError as error:
            fix = f"pip install -e '.[{EXTRAS[scheme]}]'" if scheme in EXTRAS else "install it"
            raise DataError(f"{shard}: a package for {scheme}:// is missing ({summarize(error)}): {fix}") from error
        with self._lock:
            key = f"{scheme} {options}"
            if key not in self._stores:
                self._stores[key] = kind(skip_instance_cache=True, **options)
                if scheme == "s3":
                    self._stores[key].retries = 1  # RetryPolicy is the one place that retries
            return self._stores[key], kind._strip_protocol(shard.url)


def _limits(scheme: str) -> dict:
    """Returns options that cut a stalled transfer, in addition to the user's fsspec configuration."""
    if scheme == "s3":
        mine = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "retries": {"total_max_attempts": 1}}
        return {"config_kwargs": fsspec.config.conf.get("s3", {}).get("config_kwargs", {}) | mine}
    if scheme in ("http", "https"):
        import aiohttp

        return {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)}
    return {}


def _answer(error: BaseException) -> tuple[int | None, Mapping[str, str]]:
    """Returns HTTP status and headers of the response behind an error or its cause; None where it had none."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            meta = response.get("ResponseMetadata", {})
            return meta.get("HTTPStatusCode"), meta.get("HTTPHeaders", {})
        for answer, of in ((cause, "status"), (response, "status_code"), (cause, "code")):  # aiohttp, httpx, gcsfs
            if isinstance(getattr(answer, of, None), int):
                return getattr(answer, of), getattr(answer, "headers", None) or {}
        cause = cause.__cause__
    return None, {}


def status_of(error: BaseException) -> int | None:
    """Returns the HTTP status of the response behind an error; None where it had none."""
    return _answer(error)[0]


def _permanent(shard: Shard, error: Exception) -> DataError | None:
    """Returns the error to raise where another attempt cannot help; None where it can."""
    status, _ = _answer(error)
    if status in (412, 416):
        return shard.changed("the store no longer has that version of it")
    # fsspec's http calls all that goes wrong with a first request "not found", and keeps the true cause
    missing = status is None and isinstance(error, FileNotFoundError) and error.__cause__ is None
    if status in (404, 410) or missing:
        return DataError(f"{shard} does not exist: restore it, or correct the path and rerun index_shards")
    if status in (401, 403) or (status is None and isinstance(error, PermissionError)):
        return DataError(f"{shard}: access is denied ({status or summarize(error)}): check credentials or permissions")
    if "Credentials" in type(error).__name__:
        return DataError(f"{shard}: no credentials for its store ({summarize(error)}): set them")
    return None


def _retry_after(error: Exception) -> float:
    """Returns the seconds that the server asks to wait; 0 where it does not, or gives a date."""
    _, headers = _answer(error)
    asked = next((value for name, value in headers.items() if name.lower() == "retry-after"), "")
    return float(asked) if asked.isdecimal() else 0.0


@dataclass
class RetryPolicy:
    """How long one shard is retried: `seconds` since its last progress.

    logged: shard → time of its last warning, shared by the shards of a process.
    """

    shard: Shard
    seconds: float
    logged: dict[Shard, float]
    tries: int = 0
    furthest: int = -1
    since: float = field(default_factory=time.monotonic)
    trouble: str = "no byte arrived"
    advice: str = ", or raise data.retry_seconds"

    def progress(self, done: int) -> None:
        """Record that `done` bytes of the shard are there."""
        if done > self.furthest:
            self.furthest, self.since, self.tries = done, time.monotonic(), 0

    def check(self, grace: float = 0.0) -> None:
        """Raise DataError when the time, and `grace` seconds more, are up."""
        if time.monotonic() - self.since >= self.seconds + grace:
            raise DataError(
                f"{self.shard}: gave up after {self.seconds:g} s without progress ({self.trouble}): check the network"
                f" and the store{self.advice}"
            )

    def after(self, error: Exception) -> None:
        """Pause before the next attempt.

        Raises:
            DataError: the error is permanent, or the time is up.
        """
        permanent = _permanent(self.shard, error)
        if permanent:
            raise permanent from error
        self.trouble = summarize(error)
        self.check()
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self.tries) * random.SystemRandom().uniform(0.5, 1.0)
        self.tries += 1
        now = time.monotonic()
        if now - self.logged.get(self.shard, -LOG_SECONDS) >= LOG_SECONDS:
            self.logged[self.shard] = now
            log.warning("%s: %s; retrying for up to %.0f s", self.shard, self.trouble, self.seconds)
        time.sleep(max(0.0, min(max(pause, _retry_after(error)), self.since + self.seconds - now)))

    def retry(self, attempt: Callable[[], Result]) -> Result:
        """Returns the result of the first attempt that succeeds.

        Raises:
            DataError: of `attempt` itself, or where another one cannot help.
        """
        while True:
            try:
                return attempt()
            except DataError:
                raise
            except Exception as error:  # every store has its own kinds of failure
                self.after(error)


@lru_cache(1)
def stores_of(process: int) -> Stores:
    """Returns the stores of a process that indexes; a fork must not use its parent's connections."""
    return Stores()


def ask(url: str, action: Callable[[Any, str], Result], done: Callable[[], int] = int) -> Result:
    """Returns the result of `action` on the store and the path of a URL that is not indexed yet.

    `done` returns how many bytes have arrived after an attempt: progress restarts the time.

    Raises:
        DataError: of `action` itself, or where another attempt cannot help.
    """
    policy = RetryPolicy(Shard(url, -1, ""), INDEX_SECONDS, {}, advice=", then rerun")

    def attempt() -> Result:
        try:
            return action(*stores_of(os.getpid()).of(policy.shard))
        finally:
            policy.progress(done())

    return policy.retry(attempt)
