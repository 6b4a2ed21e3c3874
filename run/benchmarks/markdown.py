"""The benchmarks' records as the tables of docs/benchmarks.md.

python -m mug.run.benchmarks.markdown kernels.jsonl model.jsonl throughput.jsonl
"""

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from mug.run.benchmarks import model_step, throughput
from mug.run.benchmarks.kernel_report import Row, introduction


def tables(rows: list[Row]) -> Iterator[str]:
    """Lines of Markdown: what it was measured on, then a table for each op, and lines for the whole model."""
    for row in rows:
        if row["kind"] == "machine":
            yield f"\n{introduction(row)}, {row['date']}\n"
        elif row["kind"] == "model_step":
            yield from (f"- {line}" for line in model_step.describe(row))
        elif row["kind"] == "throughput":
            yield f"- {throughput.describe(row)}"
    timed = [row for row in rows if row["kind"] == "time" and row["pass"] == "both"]
    for op, rows_of_op in _grouped(timed, "op"):
        yield from _attention(rows_of_op) if op == "attention" else _op(op, rows_of_op)


def _grouped(rows: list[Row], key: str) -> list[tuple[object, list[Row]]]:
    return [(value, list(group)) for value, group in groupby(rows, key=lambda row: row[key])]


def _op(op: str, rows: list[Row]) -> Iterator[str]:
    yield f"\n| {op}: shape | contender | ms | TFLOP/s | GB/s | roofline | MB | times reference |"
    yield "|---|---|---|---|---|---|---|---|"
    reference = {row["shape"]: row["median_ms"] for row in rows if row["contender"] == "reference"}
    for row in rows:
        gain = f"{reference[row['shape']] / row['median_ms']:.2f}" if row["shape"] in reference else ""
        memory = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        rates = f"{row['tflops']:.3g} | {row['gbytes_per_s']:.3g} | {100 * row['roofline']:.0f}%"
        yield f"| {row['shape']} | {row['contender']} | {row['median_ms']:.3f} | {rates} | {memory} | {gain} |"


def _attention(rows: list[Row]) -> Iterator[str]:
    """One line a shape: the project's kernel beside the fastest of PyTorch's and the fastest of all others."""
    yield "\n| attention: shape | triton ms | roofline | best SDPA | ms | times SDPA | best other | ms |"
    yield "|---|---|---|---|---|---|---|---|"
    for shape, served in _grouped(rows, "shape"):
        times = {row["contender"]: row["median_ms"] for row in served if row["right"]}
        share = {row["contender"]: f"{100 * row['roofline']:.0f}%" for row in served}
        sdpa = _fastest({name: ms for name, ms in times.items() if name.startswith("sdpa")})
        other = _fastest({name: ms for name, ms in times.items() if not name.startswith(("sdpa", "triton"))})
        ours = times.get("triton")
        gain = f"{times[sdpa] / ours:.2f}" if ours and sdpa else ""
        cells = [shape, _ms(ours), share.get("triton", ""), sdpa, _ms(times.get(sdpa)), gain, other]
        yield f"| {' | '.join(cells)} | {_ms(times.get(other))} |"


def _fastest(times: dict[str, float]) -> str:
    return min(times, key=times.get, default="")


def _ms(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.3f}"


if __name__ == "__main__":
    for file in sys.argv[1:]:
        print("\n".join(tables([json.loads(line) for line in Path(file).read_text().splitlines()])))
