"""Rows of the kernel benchmark, as a table, as a picture and in one line.

A row is a dict: kind "time" (one pass of one contender), "skipped" (a contender that did not run, with the reason)
or "machine" (what it ran on, and the ceilings).
"""

from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

from mug.run.benchmarks.kernel_ops import OURS
from mug.run.benchmarks.kernel_timing import Timing, Work

Row = dict[str, object]
LINE, LABELS, BARS, MARGIN = 18, 470, 500, 12  # of the picture, in pixels


def time_row(timing: Timing, work: Work | None, share: float | None) -> Row:
    """The figures of one pass; rates and share are None where its least work cannot be told."""
    return {
        "median_ms": 1e3 * timing.median,
        "p20_ms": 1e3 * timing.p20,
        "p80_ms": 1e3 * timing.p80,
        "runs": timing.runs,
        "tflops": work and work.flops / timing.median / 1e12,
        "gbytes_per_s": work and work.bytes / timing.median / 1e9,
        "roofline": share,
    }


def table(op: str, rows: list[Row]) -> Table:
    """One line a contender: medians of all passes; rates, share and spread of forward and backward together."""
    lines = Table(title=op, title_justify="left")
    for name in ("shape", "contender"):
        lines.add_column(name, no_wrap=True)
    for name in ("forward ms", "backward ms", "both ms", "p20 to p80", "TFLOP/s", "GB/s", "roofline", "MB", "error"):
        lines.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row["kind"] == "time" and row["pass"] == "both":
            passes = {x["pass"]: x["median_ms"] for x in rows if _same(x, row)}
            lines.add_row(row["shape"], row["contender"], *_figures(row, passes))
    return lines


def skipped(rows: list[Row]) -> list[str]:
    """A line for each contender and reason: at how many shapes it did not run, and why."""
    shapes: dict[tuple, list[object]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "skipped":
            shapes[row["contender"], row["reason"]].append(row["shape"])
    return [
        f"skipped at {len(names)} shape(s), {names[0]}{' ...' if names[1:] else ''}: {contender}: {reason}"
        for (contender, reason), names in shapes.items()
    ]


def _same(row: Row, other: Row) -> bool:
    return row["kind"] == "time" and all(row[k] == other[k] for k in ("op", "shape", "contender"))


def _figures(row: Row, passes: dict[str, float]) -> list[str]:
    times = [f"{passes[name]:.3f}" for name in ("forward", "backward", "both")]
    spread = f"{row['p20_ms']:.3f} to {row['p80_ms']:.3f}"
    peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
    share = f"{100 * row['roofline']:.0f}%"
    error = f"{row['error']:.0e}" if row["right"] else f"WRONG {row['error']:.0e}"
    return [*times, spread, f"{row['tflops']:.3g}", f"{row['gbytes_per_s']:.3g}", share, peak, error]


def picture(rows: list[Row], machine: Row, path: Path) -> None:
    """A PNG with a bar for each contender: its share of the roofline, forward and backward together."""
    bars = [row for row in rows if row["kind"] == "time" and row["pass"] == "both"]
    width, height = LABELS + BARS + 80, (len(bars) + 2) * LINE + 2 * MARGIN
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    title = f"{machine['device']}: share of the roofline ({_ceilings(machine)}), forward and backward"
    draw.text((MARGIN, MARGIN), title, "black", font)
    top = MARGIN + LINE + LINE // 2
    for line, row in enumerate(bars):
        y = top + line * LINE
        length = round(min(row["roofline"], 1.0) * BARS)
        draw.text((MARGIN, y + 1), f"{row['op']}  {row['shape']}  {row['contender']}", "black", font)
        draw.rectangle((LABELS, y + 2, LABELS + length, y + LINE - 3), "#1f6fb4" if is_ours(row) else "#b8c4ce")
        draw.text((LABELS + length + 6, y + 1), f"{100 * row['roofline']:.0f}%", "black", font)
    draw.line((LABELS + BARS, top, LABELS + BARS, height - MARGIN), "#c03030", 1)
    image.save(path)


def _ceilings(machine: Row) -> str:
    return f"copy {machine['copy_gbytes_per_s']:.0f} GB/s, product {machine['matmul_tflops']:.3g} TFLOP/s"


def introduction(machine: Row) -> str:
    versions = f"PyTorch {machine['torch']}, Triton {machine['triton']}"
    return f"{machine['device']}, {versions}, {machine['dtype']}: {_ceilings(machine)}"


def summary(rows: list[Row]) -> str:
    """Our own kernels in one line: their shares of the roofline, and their speed beside the reference's."""
    both = [row for row in rows if row["kind"] == "time" and row["pass"] == "both"]
    reference = {(row["op"], row["shape"]): row["median_ms"] for row in both if row["contender"] == "reference"}
    parts = []
    for op, contender in ((op, contender) for op, contenders in OURS.items() for contender in contenders):
        mine = [row for row in both if (row["op"], row["contender"]) == (op, contender)]
        if mine:
            shares = _range([100 * row["roofline"] for row in mine], 0)
            gains = _range([reference[op, row["shape"]] / row["median_ms"] for row in mine], 2)
            parts.append(f"{op} {contender} at {shares}% of the roofline, {gains} times the reference's speed")
    skipped = sum(row["kind"] == "skipped" for row in rows)
    return "; ".join([*parts, f"{len(both)} timed, {skipped} skipped"])


def is_ours(row: Row) -> bool:
    return row.get("contender") in OURS.get(row.get("op"), ())


def _range(values: list[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def faults(rows: list[Row]) -> list[str]:
    """What is wrong with our own kernels: wrong results, or a failure other than saying what they do not serve."""
    ours = [row for row in rows if is_ours(row)]
    wrong = [
        f"{_name(row)}: error {row['error']:.1e}" for row in ours if row.get("pass") == "both" and not row["right"]
    ]
    return wrong + [f"{_name(row)}: {row['reason']}" for row in ours if row["kind"] == "skipped" and row["failed"]]


def _name(row: Row) -> str:
    return f"{row['op']} {row['contender']} {row['shape']}"
