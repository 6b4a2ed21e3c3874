"""Metrics of a run, and results of evaluations: a JSON line each, in the run's folder.

A result's line names the `method` and what it was measured on (`encoder`, `data`, `setting`); the rest are metrics.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mug.run.common.output import append_line
from mug.run.state.checkpoint import Checkpoint

RESULTS, CAPTIONS, TRANSLATIONS = "results.jsonl", "captions.jsonl", "translations.jsonl"
NAMES = ("method", "encoder", "data", "feature", "setting")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl, without one that a crash cut short."""
    rows = []
    # Lines end in \n only: a caption in JSON may hold U+2028 or U+0085, which splitlines() takes for ends.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def held_out_metrics(found: Checkpoint) -> dict[str, float]:
    """Returns the held-out metrics at this checkpoint's step, where finite; empty if it was not evaluated."""
    metrics = found.folder.parent / "metrics.jsonl"
    rows = read_rows(metrics) if metrics.is_file() else []
    mine = [row for row in rows if row["kind"] == "eval" and row["step"] == found.step]
    metrics = mine[-1].items() if mine else ()
    shown = ("loss/", "accuracy/", "correct")
    return {name: value for name, value in metrics if name.startswith(shown) and value is not None}


def correct_line(metrics: Mapping[str, float]) -> str:
    """Returns the shares of correct captions and parts in words, of metrics as mug.run.evaluators.correct_captions
    names them; "" where there are none."""
    found = []
    for source, before in (("correct", ""), ("correct from the visible patches", "; from the visible patches alone: ")):
        shares = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith(f"{source}/")}
        captions = shares.pop("captions", None)
        if captions is not None:
            parts = "".join(f", {kind} {share:.1%}" for kind, share in shares.items())
            found.append(f"{before}captions entirely correct {captions:.1%}{parts}")
    return "".join(found)


def add_record(file: Path, record: dict[str, Any]) -> None:
    """Append a result to a file of them."""
    append_line(file, json.dumps(record, ensure_ascii=False))


def formatted(value: Any) -> str:
    """Returns a value of a result for people: a number, an interval or a text."""
    if isinstance(value, list | tuple):
        return " to ".join(map(formatted, value))
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Returns the results in the run's folder, whatever their file is called; of those measured twice, the later."""
    found = {}
    for file in sorted(folder.glob("*.jsonl")):
        for row in read_rows(file):
            if isinstance(row, dict) and "method" in row:
                found[tuple(str(row.get(name)) for name in NAMES)] = row
    return list(found.values())
