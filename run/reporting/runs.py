"""Reads a run's folder: rows, bad samples, pictures, recipe, results."""

import json
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mug.run.common.errors import RunError
from mug.run.reporting.records import CAPTIONS, read_results, read_rows
from mug.run.state.checkpoint import list_folders, read_manifest

METRICS, BAD_SAMPLES = "metrics.jsonl", "bad_samples.jsonl"
LAST = 5  # bad samples that are shown
LAUNCHES = ("start", "resume")  # the events of a process that starts or resumes a run

Row = dict[str, Any]


@dataclass
class BadSampleSummary:
    """The samples that could not be used: how many, by reason and by shard, and the latest."""

    reasons: Counter[str] = field(default_factory=Counter)
    shards: Counter[str] = field(default_factory=Counter)
    last: deque[Row] = field(default_factory=lambda: deque(maxlen=LAST))

    @property
    def entries(self) -> int:
        return self.reasons.total()


@dataclass(frozen=True)
class RunFolder:
    """One run. recipe: by dotted name, empty without a checkpoint. captions: those that run/evaluate.py wrote."""

    path: Path
    name: str
    rows: list[Row]
    recipe: Row
    bad_samples: BadSampleSummary
    results: list[Row]
    captions: list[Row]

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]

    def launches(self) -> list[Row]:
        """Returns an event for each process that started or resumed the run."""
        return [row for row in self.of_kind("event") if row.get("event") in LAUNCHES]

    def pictures(self) -> list[tuple[int, Path]]:
        """Returns step and file of each picture of held-out pairs, in the order of training."""
        found = [(path.stem.partition("-")[2], path) for path in (self.path / "samples").glob("step-*.png")]
        return sorted((int(step), path) for step, path in found if step.isdigit())


def open_runs(paths: Sequence[str]) -> list[RunFolder]:
    """Returns the runs, under distinct names.

    Raises:
        RunError: a folder is missing, named twice, or holds no metrics.
    """
    folders = [Path(path).resolve() for path in paths]
    if twice := [path for path in folders if folders.count(path) > 1]:
        raise RunError(f"{twice[0]} is named twice; name each run once")
    names = [path.name for path in folders]
    unique = [path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in folders]
    return [open_run(path, name) for path, name in zip(folders, unique, strict=True)]


def open_run(path: Path, name: str) -> RunFolder:
    if not path.is_dir():
        raise RunError(f"{path}: no such directory; give the directories of runs")
    metrics = path / METRICS
    found = read_rows(metrics) if metrics.is_file() else []
    rows = [row for row in found if isinstance(row, dict) and "kind" in row and isinstance(row.get("step"), int)]
    if not rows:
        raise RunError(f"{path} does not hold a {METRICS} with rows; choose a run that has logged a step")
    captions = read_rows(path / CAPTIONS) if (path / CAPTIONS).is_file() else []
    return RunFolder(
        path, name, rows, _recipe(path), read_bad_samples(path / BAD_SAMPLES), read_results(path), captions
    )


def read_bad_samples(file: Path) -> BadSampleSummary:
    """Read bad_samples.jsonl line by line: that of a long run can be long."""
    summary = BadSampleSummary()
    if file.is_file():
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                    summary.reasons[entry["reason"]] += 1
                    summary.shards[entry["shard"]] += 1
                except (ValueError, KeyError, TypeError):  # a line that a crash cut
                    continue
                summary.last.append(entry)
    return summary


def _recipe(path: Path) -> Row:
    """Returns the recipe in the newest checkpoint whose manifest can be read."""
    for folder in list_folders(path):
        try:
            return flat(read_manifest(folder).get("recipe", {}))
        except RunError:
            continue
    return {}


def flat(values: Row, prefix: str = "") -> Row:
    """Returns nested dicts as one, by dotted names."""
    found = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
