"""Identifies the code that runs: this package's sources, and those of the script that was started."""

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

PACKAGES = ("data", "kernels", "model", "run")
OURS = Path(__file__).parents[1]  # the folder `run` that is imported


def digest(folders: Iterable[Path]) -> str:
    """Returns the SHA-256 of the Python sources in the folders of PACKAGES, in this order."""
    sha = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            sha.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return sha.hexdigest()


def folders_beside(run: Path) -> list[Path]:
    """The folders of PACKAGES next to this one of scripts."""
    return [run.parent / name for name in PACKAGES]


def another_installation() -> str | None:
    """Returns a warning if the script that was started belongs to a checkout whose code does not run."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    theirs = Path(file).resolve().parent if file else OURS
    marker = Path(__file__).relative_to(OURS)
    if theirs == OURS.resolve() or not (theirs / marker).is_file():  # a script of the user's own
        return None
    if digest(folders_beside(theirs)) == digest(folders_beside(OURS)):
        return None
    return (
        f"{file} belongs to the checkout {theirs.parent}, but the code that runs is {OURS.resolve().parent}, as `mug`"
        f" is installed from there, and it differs: start the scripts there, or pip install -e {theirs.parent}"
    )
