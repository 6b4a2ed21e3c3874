"""Where a command writes: can it, and is the folder of a run this run's alone?"""

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from mug.run.training.errors import RunError


def check_writable(output: Path, name: str = "--output") -> None:
    """Raise RunError unless the folder that `name` says can be made and written; what does not exist yet stays so."""
    existing = output
    with contextlib.suppress(PermissionError):
        while not existing.exists():
            existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise RunError(f"{name} {output}: {existing} is no folder that can be written; name another")


def check_writable_file(path: Path, name: str) -> None:
    """Raise RunError unless the file that `name` says can be written; its folder must be there."""
    where = path if path.exists() else path.resolve().parent
    if path.is_dir() or not where.exists() or not os.access(where, os.W_OK):
        raise RunError(f"{name} {path}: name a file that can be written, in a folder that exists")


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
        holder = os.read(descriptor, 1000).decode()
        raise RunError(
            f"--output {output}: another run is writing there ({holder}); end it, or name another folder"
        ) from None
    except OSError as error:  # a file system without locks
        raise RunError(
            f"--output {output}: its file system cannot keep other runs away ({error.strerror}); mount it with locks,"
            " or name another folder"
        ) from None
    os.truncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode())
