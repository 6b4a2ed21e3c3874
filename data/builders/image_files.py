"""Which files of a folder are images: one rule for every command that reads folders. Other files are counted."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mug.data.errors import DataError
from mug.data.left_out import LeftOut

# Of the formats that mug.data.decode reads, in lower case; names are compared without regard to case.
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Folders that systems leave behind, with copies of images; so do those whose name begins with a dot.
HIDDEN = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")

Note = Callable[[str, Path], None]  # (kind, what was left out)


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(SUFFIXES)


def image_files(folder: Path, left_out: LeftOut) -> list[Path]:
    """Returns the images in a folder and the folders in it, linked ones too, sorted; the rest goes to `left_out`.

    A link to a file that is missing counts as an image, for its reader to name.

    Raises:
        DataError: a folder cannot be read.
    """
    note, found = _noting(left_out), []
    for parent, names in walk(folder, note):
        for name in names:
            if is_image(name):
                found.append(parent / name)
            else:
                note("files that are not images by their names", parent / name)
    return sorted(found)


def folders_in(folder: Path, left_out: LeftOut) -> list[Path]:
    """Returns the folders directly in a folder, linked ones too, sorted; the rest goes to `left_out`.

    Raises:
        DataError: the folder cannot be read.
    """
    note, found = _noting(left_out), []
    for entry in _entries(folder, note):
        if entry.is_dir():
            found.append(folder / entry.name)
        else:
            note("files outside the folders", folder / entry.name)
    return found


def walk(root: Path, note: Note) -> Iterator[tuple[Path, list[str]]]:
    """Yields each folder below `root`, itself first, with the sorted names of its files; those of subfolders follow.

    Links to folders are followed, but for those that lead back to what is read anyway; hidden files and folders are
    not read. Both are noted.

    Raises:
        DataError: a folder cannot be read.
    """
    real_root = os.path.realpath(root)
    seen, waiting = set(), [root]
    while waiting:
        folder = waiting.pop()
        if (real := os.path.realpath(folder)) in seen:
            note("links to folders that another link leads to", folder)
            continue
        seen.add(real)
        names, inside = [], []
        for entry in _entries(folder, note):
            path = folder / entry.name
            if not entry.is_dir():
                names.append(entry.name)
            elif entry.is_symlink() and _overlap(os.path.realpath(path), real_root):
                note("links to folders that are read anyway", path)
            else:
                inside.append(path)
        yield folder, names
        waiting += reversed(inside)


def _overlap(one: str, other: str) -> bool:
    """Whether one of two folders holds the other, or is it."""
    return os.path.commonpath([one, other]) in (one, other)


def _entries(folder: Path, note: Note) -> list[os.DirEntry]:
    """Returns what lies in a folder and is not hidden, by name."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"folder '{folder}' cannot be read ({error.strerror}): correct its permissions") from error
    for entry in found:
        if is_hidden(entry.name):
            note("hidden folders" if entry.is_dir() else "hidden files", folder / entry.name)
    return [entry for entry in found if not is_hidden(entry.name)]


def _noting(left_out: LeftOut) -> Note:
    return lambda kind, path: left_out.add(kind, f"'{path}'")
