"""Which metrics of a run's rows are drawn, where, and under what name. Unknown ones are drawn, too."""

from collections.abc import Sequence
from dataclasses import dataclass

from mug.run.reporting.chart import Line, Point, smoothed, thinned
from mug.run.reporting.runs import LAUNCHES, Row, RunFolder

LEARNING, OPTIMISER, SPEED, OTHER, PAUSES = "Learning", "Optimiser", "Throughput", "Other metrics", "Checkpoints"
SECTIONS = (LEARNING, SPEED, PAUSES, OPTIMISER, OTHER)
POINTS = 1200  # drawn in one chart, over all runs: as many as fit a page of 5 MB

# Name in the rows → section and title.
KNOWN = {
    "loss/total": (LEARNING, "Total loss"),
    "loss/pixels": (LEARNING, "Masked pixels: loss"),
    "loss/caption": (LEARNING, "Captions: loss, nats a token"),
    "accuracy/caption": (LEARNING, "Captions: next-token accuracy"),
    "correct/captions": (LEARNING, "Held-out captions: entirely correct"),
    "correct/nouns": (LEARNING, "Held-out captions: correct nouns"),
    "correct/relations": (LEARNING, "Held-out captions: correct relations"),
    "correct from the visible patches/captions": (LEARNING, "From the visible patches: entirely correct"),
    "correct from the visible patches/nouns": (LEARNING, "From the visible patches: correct nouns"),
    "correct from the visible patches/relations": (LEARNING, "From the visible patches: correct relations"),
    "accuracy/zero shot": (LEARNING, "Zero shot: top-1 accuracy"),
    "accuracy5/zero shot": (LEARNING, "Zero shot: top-5 accuracy"),
    "loss/class": (LEARNING, "Classes: loss"),
    "accuracy/class": (LEARNING, "Classes: top-1 accuracy"),
    "accuracy5/class": (LEARNING, "Classes: top-5 accuracy"),
    "loss/segments": (LEARNING, "Segments: loss"),
    "loss/auxiliary": (LEARNING, "Segments: loss of the auxiliary head"),
    "accuracy/segments": (LEARNING, "Segments: pixel accuracy"),
    "mean IoU/segments": (LEARNING, "Segments: mean IoU"),
    "mean IoU/commonest class": (LEARNING, "Segments: mean IoU of naming the commonest class"),
    "lr": (OPTIMISER, "Learning rate"),
    "grad_norm": (OPTIMISER, "Gradient norm before clipping"),
    "images_per_s": (SPEED, "Images per second"),
    "tflops": (SPEED, "TFLOP/s of a rank, forward and backward"),
    "mfu": (SPEED, "Model FLOPs utilisation"),
    "data_wait": (SPEED, "Data wait: share of a step"),
    "goodput": (SPEED, "Goodput: share of wall time that advanced the run"),
    "memory_gb": (SPEED, "Peak memory of a rank, GB"),
    "bad_samples": (SPEED, "Samples replaced so far"),
    "checkpoint: seconds": (PAUSES, "Checkpoint: seconds that training stood still"),
    "checkpoint: write_seconds": (PAUSES, "Checkpoint: seconds of writing"),
}
NOT_DRAWN = {"kind", "step", "position", "event"}


@dataclass(frozen=True)
class Figure:
    """One chart: a metric of all runs that have it."""

    section: str
    title: str
    lines: list[Line]


def collect(runs: Sequence[RunFolder]) -> tuple[list[Figure], str]:
    """Returns the metrics in order, and what their x axis counts: steps, or samples where the global batches differ."""
    batches = [run.recipe.get("trainer.global_batch") for run in runs]
    by_samples = None not in batches and len(set(batches)) > 1
    scales = batches if by_samples else [1] * len(runs)
    series: dict[str, dict[tuple[int, str], list[Point]]] = {}
    for number, run in enumerate(runs):
        for row in run.rows:
            for name, value in metrics_of(row).items():
                point = (row["step"] * scales[number], value)
                series.setdefault(name, {}).setdefault((number, row["kind"]), []).append(point)
    limit = max(40, POINTS // len(runs))
    metrics = [
        Figure(*title_of(name), [_line(runs[n].name, n, kind, points, limit) for (n, kind), points in found.items()])
        for name, found in series.items()
        if any(value is not None for points in found.values() for _, value in points)
    ]
    known = list(KNOWN.values())
    metrics.sort(key=lambda f: (SECTIONS.index(f.section), _place(known, (f.section, f.title))))
    return metrics, "samples seen" if by_samples else "step"


def metrics_of(row: Row) -> dict[str, float | None]:
    """Returns what of a row can be drawn over the steps; of an event, under the event's name. None was not finite."""
    if row.get("event") in LAUNCHES:  # these are in tables
        return {}
    prefix = f"{row['event']}: " if row["kind"] == "event" else ""
    return {
        prefix + name: value
        for name, value in row.items()
        if name not in NOT_DRAWN and not isinstance(value, bool | str | list | dict)
    }


def title_of(name: str) -> tuple[str, str]:
    """Returns section and title."""
    if name in KNOWN:
        return KNOWN[name]
    if ": " in name:
        return PAUSES, name.replace("_", " ")
    return (LEARNING if "/" in name else OTHER), name.replace("_", " ")


def _place(known: list, entry: tuple[str, str]) -> int:
    return known.index(entry) if entry in known else len(known)


def _line(run: str, number: int, kind: str, points: list[Point], limit: int) -> Line:
    points = sorted(points, key=lambda point: point[0])
    label = f"{run}, held out" if kind == "eval" else run
    smooth = smoothed(points) if kind == "train" else []
    return Line(label, number, thinned(points, limit), thinned(smooth, limit // 2), marked=kind != "train")
