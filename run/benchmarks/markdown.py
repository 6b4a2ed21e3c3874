"""The benchmarks' records as the tables of docs/benchmarks.md.

python -m mug.run.benchmarks.markdown benchmarks.md kernels.jsonl model.jsonl throughput.jsonl
"""

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from mug.run.benchmarks import model_step, throughput
from mug.run.benchmarks.kernel_report import HEADINGS, Row, both_passes, cells, introduction
from mug.run.reporting.markdown_tables import table


def tables(rows: list[Row]) -> Iterator[str]:
    """Yields lines of Markdown: what it was measured on, then a table for each op, and lines for the full model."""
    for row in rows:
        if row["kind"] == "machine":
            yield f"\n{introduction(row)}, {row['date']}\n"
        elif row["kind"] == "model_step":
            yield from (f"- {line}" for line in model_step.describe(row))
        elif row["kind"] == "throughput":
            yield f"- {throughput.describe(row)}"
    for op, timed in _grouped([row for row in rows if row["kind"] == "time"], "op"):
        yield _attention(both_passes(timed)) if op == "attention" else f"\n{op}:\n\n{table(HEADINGS, cells(timed))}"


def _grouped(rows: list[Row], key: str) -> list[tuple[object, list[Row]]]:
    return [(value, list(group)) for value, group in groupby(rows, key=lambda row: row[key])]


def _attention(rows: list[Row]) -> str:
    """Yields one line a shape: the project's kernel next to the fastest of PyTorch's and the fastest of all others."""
    lines = []
    for shape, served in _grouped(rows, "shape"):
        times = {row["contender"]: row["median_ms"] for row in served if row["right"]}
        share = {row["contender"]: f"{100 * row['roofline']:.0f}%" for row in served}
        sdpa = _fastest({name: ms for name, ms in times.items() if name.startswith("sdpa")})
        other = _fastest({name: ms for name, ms in times.items() if not name.startswith(("sdpa", "triton"))})
        ours = times.get("triton")
        gain = f"{times[sdpa] / ours:.2f}" if ours and sdpa else ""
        ours_cells = [shape, _ms(ours), share.get("triton", "")]
        lines.append([*ours_cells, sdpa, _ms(times.get(sdpa)), gain, other, _ms(times.get(other))])
    head = ["attention: shape", "triton ms", "roofline", "best SDPA", "ms", "times SDPA", "best other", "ms"]
    return f"\n{table(head, lines)}"


def _fastest(times: dict[str, float]) -> str:
    return min(times, key=times.get, default="")


def _ms(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.3f}"


if __name__ == "__main__":
    target, *records = sys.argv[1:]
    rows = [[json.loads(line) for line in Path(record).read_text(encoding="utf-8").splitlines()] for record in records]
    text = "\n".join(line for rows_of_record in rows for line in tables(rows_of_record))
    Path(target).write_text(f"{text}\n", encoding="utf-8")
    print(f"{len(text.splitlines())} lines of {len(records)} records in {target}")
