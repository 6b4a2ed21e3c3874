"""What a run has left in its folder."""

import json
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mug.run.evaluation.records import read_results
from mug.run.training.checkpoint import list_folders, read_manifest
from mug.run.training.errors import RunError
from mug.run.training.metrics import read_rows

METRICS, LEDGER, CAPTIONS = "metrics.jsonl", "ledger.jsonl", "captions.jsonl"
LAST = 5  # entries of the ledger that are shown
LIVES = ("start", "resume")  # the events with which a process takes up a run

Row = dict[str, Any]


@dataclass
class LedgerSummary:
    """The samples that could not be used: how many, by reason and by shard, and the latest."""

    reasons: Counter[str] = field(default_factory=Counter)
    shards: Counter[str] = field(default_factory=Counter)
    last: deque[Row] = field(default_factory=lambda: deque(maxlen=LAST))

    @property
    def entries(self) -> int:
        return self.reasons.total()


@dataclass(frozen=True)
class RunFolder:
    """One run. recipe: by dotted name, empty without a checkpoint. captions: what run/caption_eval.py has left."""

    path: Path
    name: str
    rows: list[Row]
    recipe: Row
    ledger: LedgerSummary
    results: list[Row]
    captions: list[Row]

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]

    def lives(self) -> list[Row]:
        """An event for each process that took up the run, the first one included."""
        return [row for row in self.of_kind("event") if row.get("event") in LIVES]

    def pictures(self) -> list[tuple[int, Path]]:
        """Step and file of each picture of held-out pairs, in the order of training."""
        found = [(path.stem.partition("-")[2], path) for path in (self.path / "samples").glob("step-*.png")]
        return sorted((int(step), path) for step, path in found if step.isdigit())


def open_runs(paths: Sequence[str]) -> list[RunFolder]:
    """The runs, under names that tell them apart.

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
        raise RunError(f"{path}: no such folder; name the folders of runs")
    metrics = path / METRICS
    found = read_rows(metrics) if metrics.is_file() else []
    rows = [row for row in found if isinstance(row, dict) and "kind" in row and isinstance(row.get("step"), int)]
    if not rows:
        raise RunError(f"{path} holds no {METRICS} with rows of a run; name a run that has logged a step")
    captions = read_rows(path / CAPTIONS) if (path / CAPTIONS).is_file() else []
    return RunFolder(path, name, rows, _recipe(path), read_ledger(path / LEDGER), read_results(path), captions)


def read_ledger(file: Path) -> LedgerSummary:
    """Line by line: a long run's ledger can be long."""
    summary = LedgerSummary()
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
    """The recipe in the newest checkpoint whose manifest can be read."""
    for folder in list_folders(path):
        try:
            return flat(read_manifest(folder).get("recipe", {}))
        except RunError:
            continue
    return {}


def flat(values: Row, prefix: str = "") -> Row:
    """Nested dicts as one, by dotted names."""
    found = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
