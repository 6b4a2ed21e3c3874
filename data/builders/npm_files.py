"""Reads the files of npm packages: archives as `npm pack` writes them, or folders they were unpacked into."""

import tarfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from mug.data.errors import DataError

MAX_FILE = 64 * 2**20  # bytes


def npm_files(source: Path, package: str, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yields path in the package and contents of those files that match the pattern, in the order of the paths.

    source: a folder that holds PACKAGE-VERSION.tgz or PACKAGE-VERSION/package, the latest of several.

    Raises:
        DataError: the package is not there, holds no such file, or cannot be read.
    """
    archives = sorted(source.glob(f"{package}-[0-9]*.tgz")) if source.is_dir() else []
    folders = sorted(source.glob(f"{package}-[0-9]*/package")) if source.is_dir() else []
    if not archives and not folders:
        raise DataError(f"'{source}' has no {package}-*.tgz: run npm pack {package} in it")
    found = _in_archive(archives[-1], pattern) if archives else _in_folder(folders[-1], pattern)
    try:
        files = sorted(found)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(f"npm package {package} in '{source}' cannot be read ({error}): fetch it again") from error
    if not files:
        raise DataError(f"npm package {package} in '{source}' has no files {pattern}: give another version")
    yield from files


def _in_archive(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if member.isfile() and member.size <= MAX_FILE and fnmatch(name, pattern):
                file = archive.extractfile(member)
                assert file is not None
                yield name, file.read()


def _in_folder(folder: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    for path in folder.glob(pattern):
        yield path.relative_to(folder).as_posix(), path.read_bytes()
