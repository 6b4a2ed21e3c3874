"""Shards by path or URL: which ones a pattern names, and their bytes wherever they lie."""

import glob
import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import urlsplit

import fsspec

from mug.data.errors import DataError
from mug.data.remote import etag_of, is_remote, reason, shown

SCHEMES = ("s3", "gs", "az", "hf", "https", "http", "memory")
Result = TypeVar("Result")


def file_name(url: str) -> str:
    return PurePosixPath(urlsplit(url).path if is_remote(url) else url).name


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


def expand(patterns: str | Sequence[str]) -> list[str]:
    """The shards that paths, URLs, globs and brace ranges name: absolute paths and URLs; a glob's come sorted.

    A string holds patterns separated by commas or spaces; of a sequence each item is one pattern.

    Raises:
        DataError: a pattern that matches nothing, or is of another kind than a file or one of SCHEMES.
    """
    if isinstance(patterns, str):
        patterns = re.split(r"[,\s]+(?![^{]*\})", patterns.strip(", \n"))  # not inside braces
    return [url for pattern in patterns for one in _braces(pattern) for url in _matches(one)]


def _matches(pattern: str) -> list[str]:
    if pattern.startswith("pipe:") or (is_remote(pattern) and pattern.partition("://")[0] not in SCHEMES):
        raise DataError(f"shards '{shown(pattern)}': give paths, or URLs of {', '.join(SCHEMES)}")
    if is_remote(pattern):
        found = _remote(pattern, lambda fs, path: map(fs.unstrip_protocol, fs.glob(path))) if "*" in pattern else None
    else:
        path = os.path.abspath(os.path.expanduser(pattern)) if pattern else pattern
        found = [one for one in glob.glob(path) or [path] if os.path.isfile(one)]
    if found is None:
        return [pattern]
    matches = sorted(found)
    if not matches:
        raise DataError(f"missing shards: '{shown(pattern)}' matches no file: correct the path or pattern")
    return matches


def _remote(url: str, action: Callable[[fsspec.AbstractFileSystem, str], Result]) -> Result:
    """The result of `action` on the file system and path of a URL; whatever fails there is a DataError."""
    try:
        return action(*fsspec.core.url_to_fs(url))
    except ImportError as error:
        raise DataError(f"shards '{shown(url)}' need a package that is not installed: {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"missing shards: '{shown(url)}' does not exist: correct the URL") from error
    except Exception as error:  # every store has its own kinds of failure
        raise DataError(f"shard '{shown(url)}': cannot be read ({reason(error)}): try again") from error


@dataclass(frozen=True)
class Stamp:
    """What tells a shard from another under its name. size: bytes; -1 where a server does not say.

    etag: a store's own mark of the content, empty where it gives none and for local files. changed: a local file's
    time of change in ns, else 0; a copy has another, so it decides only whether to scan anew, never what is refused.
    """

    size: int
    etag: str
    changed: int


def stamp(url: str) -> Stamp:
    """Size and marks of a shard.

    Raises:
        DataError: it is missing or cannot be asked.
    """
    if is_remote(url):
        info = _remote(url, lambda fs, path: fs.info(path))
        return Stamp(-1 if info.get("size") is None else info["size"], etag_of(info), 0)
    try:
        found = os.stat(url)
    except OSError as error:
        raise DataError(f"shard '{url}': cannot be read ({error.strerror}): correct the path") from error
    return Stamp(found.st_size, "", found.st_mtime_ns)


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
        """The bytes at `offset`, fewer than `length` only at the end of the file.

        Raises:
            DataError, OSError: they cannot be read.
        """
        if self.path is None:
            length = max(0, min(length, self.size - offset))
            data = _remote(self.url, lambda fs, path: fs.cat_file(path, start=offset, end=offset + length))
            if len(data) == length:
                return data
            self.local()  # this server sends the whole file, whatever is asked for
        if self.file is None:
            self.file = os.open(self.path, os.O_RDONLY)
        return os.pread(self.file, length, offset)

    def local(self) -> Path:
        """The shard as a file on this machine, whole."""
        if self.path is None:
            _remote(self.url, lambda fs, path: fs.get_file(path, str(self.scratch)))
            self.path, self.size = self.scratch, self.scratch.stat().st_size
        return self.path


def read_beside(url: str, name: str) -> bytes | None:
    """The file `name` in the shard's folder; None where there is none, or where a URL is signed for one file."""
    if is_remote(url):
        parts = urlsplit(url)
        if parts.query:
            return None
        beside = parts._replace(path=str(PurePosixPath(parts.path).with_name(name))).geturl()
        return _remote(beside, lambda fs, path: fs.cat_file(path) if fs.exists(path) else None)
    try:
        return Path(url).with_name(name).read_bytes()
    except OSError:
        return None
