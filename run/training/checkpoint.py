"""Checkpoints that a crash at any moment leaves loadable, and damage cannot enter.

A checkpoint is a folder of files and `manifest.json`. The order of a save is the promise: all ranks write their files
into `checkpoint-STEP.partial` and fsync them (saver.py), the manifest with every file's SHA-256 (and its own) is
written, the folder takes its name, `latest` is replaced, old ones go. A folder without a manifest that agrees is never
loaded.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mug.run.training.bundle import checkpoints_to_replay
from mug.run.training.errors import RunError

MANIFEST = "manifest.json"
FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files agree with its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]


def open_partial(output: Path, step: int) -> Path:
    """An empty folder for the files of a checkpoint; what earlier saves left unfinished goes, for it takes room."""
    for left in output.glob("checkpoint-*.partial"):
        shutil.rmtree(left)
    partial = output / f"checkpoint-{step}.partial"
    partial.mkdir(parents=True)
    return partial


def commit(
    output: Path, step: int, files: dict[str, dict], state: dict[str, Any], attached: dict[str, str], keep: int
) -> None:
    """Make OUTPUT/checkpoint-STEP of its partial folder; called by one rank, when all have written.

    Args:
        files: by name, what all ranks have written and fsynced: at least `size` and `sha256`.
        state: JSON values that go into the manifest (data state, recipe, vocabulary).
        attached: texts by file name, stored beside those files.
        keep: how many of the newest checkpoints remain; besides, those that a replay bundle starts from.
    """
    partial, final = output / f"checkpoint-{step}.partial", output / f"checkpoint-{step}"
    for name, text in attached.items():
        (partial / name).write_text(text)
    seals = {**files, **{name: seal(partial / name) for name in attached}}
    manifest = {"format": FORMAT, "step": step, "files": dict(sorted(seals.items())), **state}
    _write_text(partial / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1))
    _sync_folder(partial)
    os.replace(partial, final)
    _write_text(output / "latest", final.name)
    _prune(output, keep)


def commit_again(output: Path, found: Checkpoint, step: int, state: dict[str, Any], keep: int) -> None:
    """Make OUTPUT/checkpoint-STEP of the files of `found`, which are linked, not copied, and another `state`."""
    partial = open_partial(output, step)
    for name in found.manifest["files"]:
        os.link(found.folder / name, partial / name)
    own = {name: value for name, value in state.items() if name not in ("format", "step", "files")}
    commit(output, step, found.manifest["files"], own, {}, keep)


def newest(output: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of a run that is whole; damaged ones are named and passed over.

    Raises:
        RunError: there are checkpoints, but none is whole.
    """
    folders = list_folders(output)
    for folder in folders:
        try:
            return verify(folder)
        except (RunError, OSError, KeyError, TypeError) as damage:
            warn(f"{damage if isinstance(damage, RunError) else f'{folder}: {damage!r}'}; trying the one before")
    if folders:
        raise RunError(f"{output}: none of its {len(folders)} checkpoints is whole; name another --output")
    return None


def resume(output: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """`newest`, for a run that will save again: damaged checkpoints do not count among those that it keeps.

    They are no longer checkpoints by name, and the next save removes them.

    Raises:
        RunError: there are checkpoints, but none is whole.
    """
    found = newest(output, warn)
    damaged = [folder for folder in list_folders(output) if found and _step_of(folder) > found.step]
    if damaged:
        _write_text(output / "latest", found.folder.name)  # first, for it always names a whole one
    for folder in damaged:
        folder.rename(folder.with_suffix(".partial"))
    return found


def list_folders(output: Path) -> list[Path]:
    """The run's checkpoint folders, newest first."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def verify(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, once every file has the size and SHA-256 of the manifest.

    Raises:
        RunError: names the file that is missing or damaged.
    """
    manifest = read_manifest(folder)

    def check(name: str, seal: dict[str, Any]) -> None:
        path = folder / name
        if not path.is_file():
            raise RunError(f"{folder}: {name} is missing")
        if path.stat().st_size != seal["size"] or _sha256(path) != seal["sha256"]:
            raise RunError(f"{folder}: {name} is damaged (its SHA-256 is not the manifest's)")

    with ThreadPoolExecutor() as pool:  # hashing frees the interpreter
        list(pool.map(check, *zip(*manifest["files"].items(), strict=True)))
    return Checkpoint(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone, its files unread.

    Raises:
        RunError: there is none, or it is no manifest of ours.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise RunError(f"{folder}: no {MANIFEST}, so it is no finished checkpoint") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{folder}: {MANIFEST} cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RunError(f"{folder}: {MANIFEST} has another format than {FORMAT}")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise RunError(f"{folder}: {MANIFEST} is damaged (its SHA-256 is not its own)")
    return manifest


def seal(path: Path) -> dict[str, Any]:
    """fsync a file; its size and SHA-256."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    # Through JSON and back, as a reader will see it: tuples become lists.
    plain = json.loads(json.dumps(manifest))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _write_text(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, finds the old text or the new one."""
    fresh = path.with_name(path.name + ".fresh")
    with fresh.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(output: Path, keep: int) -> None:
    to_replay = checkpoints_to_replay(output)
    for folder in list_folders(output)[keep:]:
        if folder.name not in to_replay:
            # Renamed first, or a crash in mid-removal would leave a damaged one.
            shutil.rmtree(folder.rename(folder.with_suffix(".partial")))
