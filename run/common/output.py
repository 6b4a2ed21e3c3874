"""Output folders and files: checks that they are writable, atomic writes, and the lock of a run's folder."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from PIL import Image

from mug.data.builders.writers import encoded, replacing
from mug.run.common.errors import RunError


def check_writable(output: Path, name: str = "--output") -> None:
    """Raise RunError unless the folder that option `name` gives can be created and written; creates nothing."""
    existing = output
    with contextlib.suppress(PermissionError):
        while not existing.exists():
            existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise RunError(f"{name} {output}: cannot write to {existing}; choose another directory")


def check_writable_file(path: Path, name: str) -> None:
    """Raise RunError unless the file that option `name` gives can be written; its folder must exist."""
    where = path if path.exists() else path.resolve().parent
    if path.is_dir() or not where.exists() or not os.access(where, os.W_OK):
        raise RunError(f"{name} {path}: cannot write there; choose a writable file in an existing directory")


def check_new_file(path: Path, name: str) -> None:
    """Raise RunError unless the file that option `name` gives can be created: runs may use one that exists."""
    if path.exists():
        raise RunError(f"{name} {path} exists, and runs may use it: choose another file, or remove it first")
    if not os.access(path.resolve().parent, os.W_OK):
        raise RunError(f"{name} {path}: the folder {path.parent} is missing or cannot be written")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: on an error, such as a full disk, it stays as it was."""
    data = content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    if path.exists() and not path.is_file():  # a pipe or a device
        path.write_bytes(data)
        return
    with replacing(path.resolve()) as file:
        file.write(data)


def write_png(path: Path, image: Image.Image, **options: object) -> None:
    """Write a picture as PNG, by `write_whole`; `options` are those of Pillow's PNG."""
    write_whole(path, encoded(image, "PNG", **options))


def append_line(path: Path, line: str) -> None:
    """Append a line of text; on an error, such as a full disk, no part of it stays, or the next would be lost, too."""
    with path.open("ab", buffering=0) as file:
        before, rest = file.seek(0, os.SEEK_END), f"{line}\n".encode("utf-8", errors="backslashreplace")
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(before)
            raise


def lock(output: Path) -> None:
    """Keep the run's folder to this run until its process ends.

    Raises:
        RunError: another run holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 1000).decode(errors="replace")
        raise RunError(
            f"--output {output}: another run is writing there ({holder}); stop it, or choose another directory"
        ) from None
    except OSError as error:  # a file system without locks
        raise RunError(
            f"--output {output}: its file system does not support file locks ({error.strerror}); mount it with locks,"
            " or choose another directory"
        ) from None
    with contextlib.suppress(OSError):  # a full disk, which may have room again once the lock is held
        os.truncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode())
