"""Shards by path or URL: which ones a pattern names, and their bytes wherever they lie."""

import glob
import logging
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from mug.data.errors import DataError
from mug.data.store.patterns import as_glob, braces, first_of_braces, words
from mug.data.store.remote import ask, etag_of, is_remote, redact_url, status_of, unsigned

SCHEMES = ("s3", "gs", "az", "hf", "https", "http", "memory")
log = logging.getLogger("mug")


def file_name(url: str) -> str:
    return PurePosixPath(urlsplit(url).path if is_remote(url) else url).name


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Returns the shards that paths, URLs, globs and brace ranges name: absolute paths and URLs; a glob's come sorted.

    A string holds patterns separated by commas or spaces, unless it is one of a path that holds such; of a sequence
    each item is one pattern. A shard that is named twice is kept twice, with a warning.

    Raises:
        DataError: a pattern that matches nothing, or has another scheme than those of SCHEMES.
    """
    if isinstance(patterns, str):
        patterns = [patterns] if _is_one(patterns) else words(patterns)
    urls = [url for pattern in patterns for one in braces(pattern) for url in _matches(one)]
    twice = [url for url, times in Counter(urls).items() if times > 1]
    if twice:
        log.warning(
            "%d shards are named more than once, the first '%s': their samples are repeated as often",
            len(twice),
            redact_url(twice[0]),
        )
    return urls


def without_signatures(patterns: str) -> str:
    """Returns the patterns as a file may keep them: URLs without passwords and queries."""
    return ",".join(unsigned(word) for word in words(patterns)) if is_remote(patterns) else patterns


def _is_one(patterns: str) -> bool:
    """Whether a string that could be cut is the pattern of one path, with spaces or commas in its names."""
    if is_remote(patterns) or words(patterns) == [patterns]:
        return False
    return any(os.path.isfile(path) for path in _glob(first_of_braces(patterns)))


def _glob(pattern: str) -> list[str]:
    """Returns the local paths that a pattern without braces matches; itself where it is not a glob.

    Brackets that choose no character are those of a name; a file of exactly this name comes before all that match.
    """
    path = os.path.abspath(os.path.expanduser(pattern)) if pattern else pattern
    if os.path.isfile(path):  # a name that a shell has expanded, whatever it holds
        return [path]
    return glob.glob(as_glob(path)) or glob.glob(as_glob(path.replace("[", "[[]"))) or [path]


def _matches(pattern: str) -> list[str]:
    if pattern.startswith("pipe:") or (is_remote(pattern) and pattern.partition("://")[0] not in SCHEMES):
        raise DataError(f"shards '{redact_url(pattern)}': give paths, or URLs of {', '.join(SCHEMES)}")
    found = _remote_matches(pattern) if is_remote(pattern) else _local_matches(pattern)
    if not found:
        raise DataError(
            f"missing shards: '{redact_url(pattern)}' does not match a file: correct the path or pattern; paths with"
            " spaces or commas are given alone, or to run/index_shards.py"
        )
    return sorted(found)


def _remote_matches(url: str) -> list[str]:
    if not set("*" if url.startswith("http") or ("?" in url and "=" in url) else "*?[") & set(url):  # ? begins a query
        return [url]
    found = ask(url, lambda fs, path: [fs.unstrip_protocol(one) for one in fs.glob(as_glob(path))])
    return [one for one in found if not file_name(one).startswith(".") or file_name(url).startswith(".")]


def _local_matches(pattern: str) -> list[str]:
    found = sorted(_glob(pattern))
    files = [one for one in found if os.path.isfile(one)]
    if folders := [one for one in found if os.path.isdir(one)] if files else []:
        log.warning("'%s' also matches %d folders, the first '%s': left out", pattern, len(folders), folders[0])
    for one in found:
        if os.path.islink(one) and not os.path.exists(one):
            raise DataError(f"missing shards: '{one}' is a link to nothing: restore its target or remove it")
    return files


@dataclass(frozen=True)
class FileVersion:
    """The marks of a shard's content. size: bytes; -1 where a server does not report it.

    etag: a store's own mark of the content, empty where it gives none and for local files. changed: when a local file
    or its metadata last changed, in ns, which no program can set, else 0; a copy has another time, so it decides
    only whether to scan again, never what is refused.
    """

    size: int
    etag: str
    changed: int


def stamp(url: str) -> FileVersion:
    """Returns size and marks of a shard.

    Raises:
        DataError: it is missing or cannot be queried.
    """
    if is_remote(url):
        info = ask(url, lambda fs, path: fs.info(path))
        return FileVersion(-1 if info.get("size") is None else info["size"], etag_of(info), 0)
    try:
        found = os.stat(url)
    except OSError as error:
        raise DataError(f"shard '{url}': cannot be read ({error.strerror}): correct the path") from error
    return FileVersion(found.st_size, "", found.st_ctime_ns)


class Source(AbstractContextManager):
    """One shard, open for reading. A remote one is read by ranges, or copied to `scratch` where that is needed."""

    def __init__(self, url: str, size: int, scratch: Path):
        self.url = url
        self.size = size
        self.scratch = scratch
        self.path = None if is_remote(url) else Path(url)
        self.file: int | None = None

    def __exit__(self, *failure: object) -> None:
        if self.file is not None:
            os.close(self.file)
        self.scratch.unlink(missing_ok=True)

    def read(self, offset: int, length: int) -> bytes:
        """Returns the bytes at `offset`, fewer than `length` only at the end of the file.

        Raises:
            DataError, OSError: they cannot be read.
        """
        if self.path is None:
            length = max(0, min(length, self.size - offset))
            data = ask(self.url, lambda fs, path: fs.cat_file(path, start=offset, end=offset + length))
            if len(data) == length:
                return data
            self.local()  # this server sends the entire file, whatever is requested
        if self.file is None:
            self.file = os.open(self.local(), os.O_RDONLY)
        return os.pread(self.file, length, offset)

    def local(self) -> Path:
        """Returns the path of the complete shard on this machine."""
        if self.path is None:
            ask(self.url, lambda fs, path: fs.get_file(path, str(self.scratch)), self._copied)
            self.path, self.size = self.scratch, self._copied()
        return self.path

    def _copied(self) -> int:
        return self.scratch.stat().st_size if self.scratch.exists() else 0


def read_beside(url: str, name: str) -> bytes | None:
    """Returns the file `name` in the shard's folder; None where it does not exist or may not be requested.

    A store without the right to list answers "forbidden" for what does not exist, and a signed URL is for one file.
    """
    if not is_remote(url):
        try:
            return Path(url).with_name(name).read_bytes()
        except OSError:
            return None
    parts = urlsplit(url)
    if parts.query:
        return None

    def read(fs: Any, path: str) -> bytes | None:
        try:
            return fs.cat_file(path)
        except Exception as error:
            status = status_of(error)
            absent = isinstance(error, FileNotFoundError | PermissionError) if status is None else status // 100 == 4
            if not absent or status in (408, 425, 429):
                raise
            return None

    return ask(parts._replace(path=str(PurePosixPath(parts.path).with_name(name))).geturl(), read)
