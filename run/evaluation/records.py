"""Results of evaluations: a JSON line each, kept in the run's folder, where the report finds them.

A line names the `method` and what it was measured on (`encoder`, `data`, `setting`); the rest are figures.
"""

import json
from pathlib import Path
from typing import Any

from mug.run.training.metrics import read_rows

RESULTS = "results.jsonl"
NAMES = ("method", "encoder", "data", "feature", "setting")


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
