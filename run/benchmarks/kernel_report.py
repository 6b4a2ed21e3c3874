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
from mug.run.common.output import write_png

Row = dict[str, object]
HEADINGS = ["shape", "contender", "forward ms", "backward ms", "both ms", "p20 to p80", "TFLOP/s", "GB/s"]
HEADINGS += ["roofline", "MB", "times reference", "error"]
LINE, LABELS, BARS, MARGIN = 18, 470, 500, 12  # of the picture, in pixels


def time_row(timing: Timing, work: Work | None, share: float | None) -> Row:
    """Returns the metrics of one pass; rates and share are None where its minimum work is unknown."""
    return {
        "median_ms": 1e3 * timing.median,
        "p20_ms": 1e3 * timing.p20,
        "p80_ms": 1e3 * timing.p80,
        "runs": timing.runs,
        "tflops": work and work.flops / timing.median / 1e12,
        "gbytes_per_s": work and work.bytes / timing.median / 1e9,
        "roofline": share,
    }


def cells(rows: list[Row]) -> list[list[str]]:
    """Yields a line a contender, under HEADINGS: medians of all passes; the rest of forward and backward together."""
    medians = {(*_key(row), row["pass"]): row["median_ms"] for row in rows if row["kind"] == "time"}
    return [_line(row, medians) for row in both_passes(rows)]


def _line(row: Row, medians: dict[tuple[object, ...], float]) -> list[str]:
    times = [f"{medians[(*_key(row), name)]:.3f}" for name in ("forward", "backward", "both")]
    spread = f"{row['p20_ms']:.3f} to {row['p80_ms']:.3f}"
    rates = [f"{row['tflops']:.3g}", f"{row['gbytes_per_s']:.3g}", f"{100 * row['roofline']:.0f}%"]
    peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
    reference = medians.get((row["op"], row["shape"], "reference", "both"))
    gain = "" if reference is None else f"{reference / row['median_ms']:.2f}"
    error = f"{'' if row['right'] else 'WRONG '}{row['error']:.0e}"
    return [row["shape"], row["contender"], *times, spread, *rates, peak, gain, error]


def _key(row: Row) -> tuple[object, ...]:
    return row["op"], row["shape"], row["contender"]


def both_passes(rows: list[Row]) -> list[Row]:
    """Returns the rows of forward and backward together."""
    return [row for row in rows if row["kind"] == "time" and row["pass"] == "both"]


def table(op: str, rows: list[Row]) -> Table:
    """Returns the rows of an op for a terminal."""
    lines = Table(title=op, title_justify="left")
    for name in HEADINGS:
        lines.add_column(name, no_wrap=True, justify="left" if name in ("shape", "contender") else "right")
    for line in cells(rows):
        lines.add_row(*line)
    return lines


def lines(rows: list[Row]) -> list[str]:
    """Returns what was timed at one shape in a line, forward and backward together; empty where nothing was."""
    both = both_passes(rows)
    parts = [f"{row['contender']} {row['median_ms']:.3f} ms ({_verdict(row)})" for row in both]
    return [f"{both[0]['op']} {both[0]['shape']}: {', '.join(parts)}"] if both else []


def _verdict(row: Row) -> str:
    return f"{100 * row['roofline']:.0f}%" if row["right"] else f"WRONG {row['error']:.0e}"


def skipped(rows: list[Row]) -> list[str]:
    """Returns a line for each contender and reason: at how many shapes it did not run, and why."""
    shapes: dict[tuple, list[object]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "skipped":
            shapes[row["contender"], row["reason"]].append(row["shape"])
    return [
        f"skipped at {len(names)} shape(s), {names[0]}{' ...' if names[1:] else ''}: {contender}: {reason}"
        for (contender, reason), names in shapes.items()
    ]


def picture(rows: list[Row], machine: Row, path: Path) -> None:
    """Draw a PNG with a bar for each contender: its share of the roofline, forward and backward together."""
    bars = both_passes(rows)
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
    write_png(path, image)


def _ceilings(machine: Row) -> str:
    return f"copy {machine['copy_gbytes_per_s']:.0f} GB/s, product {machine['matmul_tflops']:.3g} TFLOP/s"


def introduction(machine: Row) -> str:
    versions = f"PyTorch {machine['torch']}, Triton {machine['triton']}"
    return f"{machine['device']}, {versions}, {machine['dtype']}: {_ceilings(machine)}"


def summary(rows: list[Row]) -> str:
    """Returns the project's kernels in one line: shares of the roofline, and speed relative to the best other's."""
    both, parts = both_passes(rows), []
    for op, contender in ((op, contender) for op, contenders in OURS.items() for contender in contenders):
        mine = [row for row in both if (row["op"], row["contender"]) == (op, contender)]
        if mine:
            shares = f"{op} {contender} at {_range([100 * row['roofline'] for row in mine], 0)}% of the roofline"
            gains = [best / row["median_ms"] for row in mine if (best := _best_other(both, row))]
            parts.append(f"{shares}, {_range(gains, 2)} times as fast as the best other" if gains else shares)
    skipped = sum(row["kind"] == "skipped" for row in rows)
    return "; ".join([*parts, f"{len(both)} timed, {skipped} skipped"])


def _best_other(both: list[Row], mine: Row) -> float | None:
    """Returns the milliseconds of the project's fastest correct competitor, at the shape of `mine`."""
    same = [row for row in both if (row["op"], row["shape"]) == (mine["op"], mine["shape"])]
    return min((row["median_ms"] for row in same if row["right"] and not is_ours(row)), default=None)


def is_ours(row: Row) -> bool:
    return row.get("contender") in OURS.get(row.get("op"), ())


def _range(values: list[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def faults(rows: list[Row]) -> list[str]:
    """Returns what is wrong with the project's kernels: wrong results, or a failure other than a refusal."""
    wrong = [
        f"{_name(row)}: error {row['error']:.1e}" for row in both_passes(rows) if is_ours(row) and not row["right"]
    ]
    failed = [row for row in rows if row["kind"] == "skipped" and row["failed"] and is_ours(row)]
    return wrong + [f"{_name(row)}: {row['reason']}" for row in failed]


def _name(row: Row) -> str:
    return f"{row['op']} {row['contender']} {row['shape']}"
