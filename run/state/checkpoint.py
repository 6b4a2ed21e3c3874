"""Checkpoints that a crash at any moment leaves loadable, and damage cannot enter.

A checkpoint is a folder of files and `manifest.json`. The order of a save is the promise: all ranks write their files
into `checkpoint-STEP.partial` and fsync them (saver.py), the manifest with every file's SHA-256 (and its own) is
written, the folder takes its name, `latest` is replaced, old ones go. A folder without a manifest that agrees is never
loaded. What cannot be read may be complete: nothing takes its place, and it is never removed.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mug.run.common.errors import RunError
from mug.run.state.replay_bundle import checkpoints_to_replay

MANIFEST = "manifest.json"
FORMAT = 3
PAUSES = (0.5, 2.0)  # seconds before another attempt to read: ESTALE and EIO of a network file system may pass

T = TypeVar("T")


class Damaged(RunError):
    """A checkpoint that is proven to be damaged: a file is missing, or its size or SHA-256 differs."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files agree with its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]


def open_partial(output: Path, step: int) -> Path:
    """Returns a new empty folder for the files of a checkpoint."""
    _remove_unfinished(output)
    partial = output / f"checkpoint-{step}.partial"
    partial.mkdir(parents=True)
    return partial


def _remove_unfinished(output: Path) -> list[Path]:
    """Remove what earlier saves left unfinished, as it takes disk space."""
    folders = list(output.glob("checkpoint-*.partial"))
    for folder in folders:
        shutil.rmtree(folder)
    return folders


def commit(
    output: Path, step: int, files: dict[str, dict], state: dict[str, Any], text_files: dict[str, str], keep: int
) -> None:
    """Make OUTPUT/checkpoint-STEP of its partial folder; called by one rank, when all have written.

    Args:
        files: by name, what all ranks have written and fsynced: at least `size` and `sha256`.
        state: JSON values that go into the manifest (data state, recipe, vocabulary).
        text_files: texts by file name, stored next to those files.
        keep: how many of the newest checkpoints remain, in addition to those that a replay bundle starts from.
    """
    partial, final = output / f"checkpoint-{step}.partial", output / f"checkpoint-{step}"
    for name, text in text_files.items():
        (partial / name).write_text(text, encoding="utf-8")
    checksums = {**files, **{name: checksum(partial / name) for name in text_files}}
    manifest = {"format": FORMAT, "step": step, "files": dict(sorted(checksums.items())), **state}
    _write_text(partial / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1))
    _sync_folder(partial)
    os.replace(partial, final)
    _write_text(output / "latest", final.name)
    _prune(output, keep)


def fork(output: Path, found: Checkpoint, step: int, state: dict[str, Any], keep: int) -> None:
    """Make OUTPUT/checkpoint-STEP of the files of `found`, which are linked, not copied, and another `state`."""
    partial = open_partial(output, step)
    for name in found.manifest["files"]:
        os.link(found.folder / name, partial / name)
    own = {name: value for name, value in state.items() if name not in ("format", "step", "files")}
    commit(output, step, found.manifest["files"], own, {}, keep)


def newest(output: Path, warn: Callable[[str], None], format: int = FORMAT) -> Checkpoint | None:
    """Returns a run's newest intact checkpoint; damaged ones are reported and passed over.

    Raises:
        RunError: there are checkpoints, but none is intact; or one cannot be read, and may be intact.
    """
    folders = list_folders(output)
    for folder in folders:
        try:
            return verify(folder, format)
        except Damaged as damage:
            warn(f"{damage}; trying the previous one")
    if folders:
        raise RunError(
            f"{output}: none of its {len(folders)} checkpoints is intact; restore a copy of one, or name another folder"
        )
    return None


def resume(output: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Returns `newest`, for a run that will save again: damaged checkpoints do not count among those that it keeps.

    They are renamed to `checkpoint-STEP.damaged`, and stay until the user removes them. What a save has left unfinished
    is removed: the run may need the disk space before its first save.

    Raises:
        RunError: see `newest`.
    """
    found = newest(output, warn)
    for folder in _remove_unfinished(output):
        warn(f"removed {folder}, left by a save that did not finish")
    damaged = [folder for folder in list_folders(output) if found and step_of(folder) > found.step]
    if damaged:
        _write_text(output / "latest", found.folder.name)  # first, for it always names an intact one
    for folder in damaged:
        aside = _free_name(folder.with_suffix(".damaged"))
        folder.rename(aside)
        warn(f"renamed {folder} to {aside.name}; remove it when you no longer need it")
    return found


def _free_name(path: Path) -> Path:
    names = itertools.chain([path], (path.with_name(f"{path.name}.{number}") for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def list_folders(output: Path) -> list[Path]:
    """The run's checkpoint folders, newest first.

    Raises:
        RunError: the run's folder cannot be read.
    """
    return sorted(_patiently(output, lambda: _list_folders(output)), key=step_of, reverse=True)


def _list_folders(output: Path) -> list[Path]:
    try:
        with os.scandir(output) as entries:  # Path.glob takes an unreadable folder for empty
            folders = [Path(entry) for entry in entries if entry.is_dir() or entry.is_symlink()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder for folder in folders if re.fullmatch(r"checkpoint-\d+", folder.name)]


def step_of(folder: Path) -> int:
    """Returns the step of a checkpoint, from its folder's name."""
    return int(folder.name.partition("-")[2])


def verify(folder: Path, format: int = FORMAT) -> Checkpoint:
    """Returns the checkpoint in `folder`, after verifying every file's size and SHA-256 against the manifest.

    Raises:
        Damaged: names the file that is missing or damaged.
        RunError: a file cannot be read, or another version of this program wrote it.
    """
    return _patiently(folder, lambda: _verify(folder, format))


def _verify(folder: Path, format: int) -> Checkpoint:
    manifest = _read_manifest(folder, format)

    def check(name: str, checksum: dict[str, Any]) -> None:
        path = folder / name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            if path.is_symlink():  # its target may come back
                raise
            raise Damaged(f"{folder}: {name} is missing") from None
        if size != checksum["size"] or _sha256(path) != checksum["sha256"]:
            raise Damaged(f"{folder}: {name} is damaged (its SHA-256 does not match the manifest)")

    with ThreadPoolExecutor() as pool:  # hashing frees the interpreter
        list(pool.map(check, *zip(*manifest["files"].items(), strict=True)))
    return Checkpoint(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest only; its files are not read.

    Raises:
        Damaged: it is missing, or not as it was written.
        RunError: it cannot be read, or another version of this program wrote it.
    """
    return _patiently(folder, lambda: _read_manifest(folder, FORMAT))


def _read_manifest(folder: Path, format: int) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not folder.is_dir() or (folder / MANIFEST).is_symlink():  # the link's target may come back
            raise
        raise Damaged(f"{folder}: {MANIFEST} is missing, so the checkpoint is incomplete") from None
    except ValueError as error:
        raise Damaged(f"{folder}: {MANIFEST} is damaged ({error})") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise Damaged(f"{folder}: {MANIFEST} is damaged (it has no format)")
    if manifest["format"] == FORMAT != format:
        raise RunError(f"{folder} already has the current format, {FORMAT}: there is nothing to convert")
    if manifest["format"] != format:
        remedy = "use the version of this program that wrote it, or choose another --output"
        if manifest["format"] < format:
            remedy = f"convert it: python run/convert_checkpoint.py {folder} NEW"
        raise RunError(f"{folder}: {MANIFEST} has format {manifest['format']}, not {format}; {remedy}")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise Damaged(f"{folder}: {MANIFEST} is damaged (its SHA-256 does not match)")
    return manifest


def _patiently(folder: Path, read: Callable[[], T]) -> T:
    """Return what `read` does, after further attempts if it cannot read.

    Raises:
        RunError: none of them could.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except OSError as error:
            if pause is None:
                raise RunError(
                    f"{error.filename or folder} cannot be read ({error.strerror or error}); it may be intact, so"
                    f" the run does not start without it: make it readable and rerun the same command, or move {folder}"
                    " away"
                ) from None
            time.sleep(pause)


def checksum(path: Path) -> dict[str, Any]:
    """fsync a file; returns its size and SHA-256."""
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
    with fresh.open("w", encoding="utf-8") as file:
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
    try:
        to_replay, folders = checkpoints_to_replay(output), list_folders(output)
    except (OSError, RunError):  # which ones are needed is unknown: the next save may remove some
        return
    for folder in folders[keep:]:
        if folder.name not in to_replay:
            # Renamed first, or a crash in mid-removal would leave a damaged one.
            shutil.rmtree(folder.rename(folder.with_suffix(".partial")))
