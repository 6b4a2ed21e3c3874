"""What a run measured while it trained, and results of evaluations: a JSON line each, in the run's folder.

A result's line names the `method` and what it was measured on (`encoder`, `data`, `setting`); the rest are figures.
"""

import json
from pathlib import Path
from typing import Any

from mug.run.training.checkpoint import Checkpoint
from mug.run.training.metrics import read_rows

RESULTS = "results.jsonl"
NAMES = ("method", "encoder", "data", "feature", "setting")


def held_out_figures(found: Checkpoint) -> dict[str, float]:
    """What the run measured on held-out pairs at this checkpoint's step, where finite; empty if it did not."""
    metrics = found.folder.parent / "metrics.jsonl"
    rows = read_rows(metrics) if metrics.is_file() else []
    mine = [row for row in rows if row["kind"] == "eval" and row["step"] == found.step]
    figures = mine[-1].items() if mine else ()
    return {name: value for name, value in figures if name.startswith(("loss/", "accuracy/")) and value is not None}


def add_result(folder: Path, row: dict[str, Any]) -> None:
    """Append a result to those in the run's folder."""
    with (folder / RESULTS).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results in the run's folder, whatever their file is called; of those measured twice, the later."""
    found = {}
    for file in sorted(folder.glob("*.jsonl")):
        for row in read_rows(file):
            if isinstance(row, dict) and "method" in row:
                found[tuple(str(row.get(name)) for name in NAMES)] = row
    return list(found.values())
