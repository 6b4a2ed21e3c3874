"""The sections of the report, as values for its template."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from mug.run.reporting.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, can_be_log, draw, short
from mug.run.reporting.grid import Row as GridRow
from mug.run.reporting.grid import read_grid
from mug.run.reporting.hero import draw_hero, draw_training
from mug.run.reporting.metrics import SECTIONS, Figure, collect
from mug.run.reporting.page import bytes_url, data_url, render
from mug.run.reporting.records import correct_line, formatted
from mug.run.reporting.runs import Row, RunFolder

COLOURS = 8  # of the style; later runs begin again
STEPS_SHOWN = 6  # pictures of a run, spread over training
GRIDS_MOVING = 20  # frames, likewise
HERO_ROWS = 3
PAIRS_SHOWN = 48  # held-out pairs in all pictures together, at most 8 a run
CAPTIONS_SHOWN = 8
SHARDS_SHOWN = 10
LAUNCHES_SHOWN = 6
JPEG_QUALITY = 80
PLOT = {"left": LEFT, "width": WIDTH - LEFT - RIGHT, "top": TOP, "height": HEIGHT - TOP - BOTTOM}
PAINTED = "reconstruction"  # the column of a grid that changes in training
# Medians in the first table: name in the rows, title, format.
SUMMARIES = (
    ("images_per_s", "images a second, median", short),
    ("data_wait", "data wait, median", "{:.1%}".format),
    ("mfu", "model FLOPs utilisation, median", "{:.1%}".format),
)
TO_FIRST_STEP = "seconds/total"  # of a start or resume event; its parts are seconds/PHASE

Table = tuple[list[str], list[list[str]]]  # heads, rows


@dataclass(frozen=True)
class Block:
    """A part of a section, its fields shown in this order; `summary` folds the tables away."""

    heading: str = ""
    note: str = ""
    figures: Sequence[dict[str, Any]] = ()
    heroes: Sequence[tuple[str, str]] = ()  # large pictures: URL, text
    strips: Sequence[list[tuple[str, str, str]]] = ()  # pictures in a row: URL, title, text
    summary: str = ""
    tables: Sequence[Table] = ()


def build(title: str, runs: Sequence[RunFolder], warn: Callable[[str], None]) -> str:
    """Returns the page. `warn` is called for pictures that cannot be read."""
    metrics, x_label = collect(runs)
    drawn = {name: charts([f for f in metrics if f.section == name], x_label, runs) for name in SECTIONS}
    sections = {
        "At a glance": glance(runs, warn),
        "Runs": overview(runs),
        SECTIONS[0]: drawn.pop(SECTIONS[0]),
        "Transfer": transfer(runs),
        "Held-out pairs": pictures(runs, warn),
        "Captions": captions(runs),
        **drawn,
        "Restarts": restarts(runs),
        "Bad samples": bad_sample_tables(runs),
        "Recipes": recipes(runs),
    }
    shown = {name: blocks for name, blocks in sections.items() if blocks}
    return render("report.html", title=title, sections=shown, plot=PLOT)


# --- At a glance ------------------------------------------------------------------------------------------


def glance(runs: Sequence[RunFolder], warn: Callable[[str], None]) -> list[Block]:
    """Returns what the latest pictures of each run show, and how they came about."""
    blocks = []
    for number, run in enumerate(runs):
        grids = _grids(run, warn, GRIDS_MOVING)
        evaluations = run.of_kind("eval")
        note = correct_line(evaluations[-1]) if evaluations else ""
        if grids:
            *_, latest = grids.values()
            pictures = [(data_url(draw_hero(latest[:HERO_ROWS])), "; ".join(map(_alt_text, latest[:HERO_ROWS])))]
            if len(grids) > 1 and PAINTED in latest[0].images:
                moving = bytes_url(draw_training(grids, PAINTED), "webp")
                pictures.append((moving, "reconstructions through training"))
            blocks.append(Block(_named(run, number), note and f"Held out: {note}.", heroes=pictures))
    return blocks


def _alt_text(row: GridRow) -> str:
    """Returns a row's captions, for those who cannot see the picture."""
    return ", ".join(f"{author}: {text}" for author, text in row.captions.items())


# --- Overview ---------------------------------------------------------------------------------------------


def overview(runs: Sequence[RunFolder]) -> list[Block]:
    facts = [_facts(run) for run in runs]
    names = dict.fromkeys(name for found in facts for name in found)
    rows = [[name, *(found.get(name, "") for found in facts)] for name in names]
    return [Block(tables=[(["", *map(_named, runs, range(len(runs)))], rows)])]


def _facts(run: RunFolder) -> dict[str, str]:
    """Returns the first table's entries about a run, by name."""
    train, held_out, launches = run.of_kind("train"), run.of_kind("eval"), run.launches()
    facts: dict[str, Any] = {"steps": f"{max(row['step'] for row in run.rows):,}"}
    facts["model"] = run.recipe.get("model.preset")
    if positions := [row["position"] for row in train if "position" in row]:
        facts["samples seen"] = f"{positions[-1]:,}"
    if held_out:
        metrics = {name: value for name, value in held_out[-1].items() if "/" in name and value is not None}
        shares = correct_line(metrics)
        others = {name: value for name, value in metrics.items() if not (shares and name.startswith("correct"))}
        facts["held out, last evaluation"] = _pairs(others)
        facts["held-out captions"] = shares or None
    for name, title, form in SUMMARIES:
        if values := [row[name] for row in run.rows if row.get(name) is not None]:
            facts[title] = form(statistics.median(values))
    facts["samples replaced"] = f"{run.bad_samples.entries:,}"
    facts |= _interruptions(run)
    if launches:
        latest = launches[-1]
        facts["device"] = latest.get("device")
        facts["ranks (processes)"], facts["ZeRO stage"] = latest.get("world_size"), latest.get("zero_stage")
        facts["versions"] = ", ".join(f"{n} {latest[n]}" for n in ("torch", "deepspeed", "timm") if n in latest)
    return {name: str(value) for name, value in facts.items() if value is not None}


def _interruptions(run: RunFolder) -> dict[str, str]:
    """Returns the time that the run lost to restarts and to saving."""
    facts, launches = {}, run.launches()
    if goodput := [row["goodput"] for row in run.of_kind("train") if row.get("goodput") is not None]:
        facts["goodput: time that advanced the run"] = f"{goodput[-1]:.1%}"  # each is of the time since the first start
    if launches:
        facts["restarts"] = f"{len(launches) - 1}"
    if again := [launch[TO_FIRST_STEP] for launch in launches[1:] if TO_FIRST_STEP in launch]:
        facts["restart to first step"] = f"{statistics.median(again):.1f} s, median"
    saves = [row for row in run.of_kind("event") if row.get("event") == "checkpoint"]
    if stalls := [row["seconds"] for row in saves if row.get("seconds") is not None]:
        facts["checkpoint stall"] = (
            f"{statistics.median(stalls):.2f} s, median of {len(stalls)}; {sum(stalls):.1f} s in all"
        )
    return facts


# --- Charts -----------------------------------------------------------------------------------------------


def charts(metrics: Sequence[Figure], x_label: str, runs: Sequence[RunFolder]) -> list[Block]:
    marks = _resumes(runs) if x_label == "step" else []
    if not metrics:
        return []
    held_out = any(line.label.endswith("held out") for figure in metrics for line in figure.lines)
    notes = ["Held out: on samples that are never trained on."] * held_out
    notes += ["Upright dashes: resumed from a checkpoint."] * bool(marks)
    return [Block(note=" ".join(notes), figures=[_chart(figure, x_label, marks) for figure in metrics])]


def _resumes(runs: Sequence[RunFolder]) -> list[tuple[float, int, str]]:
    return [
        (row["step"], number % COLOURS, f"{run.name} resumed after step {row['step']}")
        for number, run in enumerate(runs)
        for row in run.launches()
        if row["event"] == "resume"
    ]


def _chart(figure: Figure, x_label: str, marks: list[tuple[float, int, str]]) -> dict[str, Any]:
    """Returns title, lines for the legend, and the chart, on a linear scale and where it helps a logarithmic one."""
    lines = [replace(line, colour=line.colour % COLOURS) for line in figure.lines]
    return {
        "title": figure.title,
        "lines": lines,
        "drawn": draw(lines, x_label, marks),
        "log": draw(lines, x_label, marks, log=True) if can_be_log(lines) else "",
        "data": {"x": x_label, "series": [{"label": line.label, "points": line.points} for line in lines]},
    }


# --- Transfer ---------------------------------------------------------------------------------------------


def transfer(runs: Sequence[RunFolder]) -> list[Block]:
    rows = [
        [
            _named(run, number),
            *(str(row.get(name) or "") for name in ("method", "data", "encoder")),
            " ".join(str(row[name]) for name in ("feature", "setting") if row.get(name)),
            _result(row),
        ]
        for number, run in enumerate(runs)
        for row in run.results
    ]
    return [Block(tables=[(["run", "method", "data", "encoder", "feature", "result"], rows)])] if rows else []


def _result(row: Row) -> str:
    """Returns an accuracy with its intervals, in percent; of other methods all metrics by name."""
    if "accuracy" not in row:
        return _pairs({name: value for name, value in row.items() if isinstance(value, int | float | list)})
    text = f"{row['accuracy']:.2%}"
    if row.get("deviation") is not None:
        text += f" ± {100 * row['deviation']:.2f} ({row['seeds']} seeds)"
    if row.get("test_interval"):
        low, high = row["test_interval"]
        text += f", 95% over test images {low:.2%} to {high:.2%}"
    return text


def _pairs(metrics: Row) -> str:
    return ", ".join(f"{name} {formatted(value)}" for name, value in metrics.items())


# --- Pictures and captions --------------------------------------------------------------------------------


def pictures(runs: Sequence[RunFolder], warn: Callable[[str], None]) -> list[Block]:
    """Returns a strip per held-out pair: what it is, what the encoder saw, and its output through training."""
    limit = max(1, min(8, PAIRS_SHOWN // len(runs)))
    blocks = []
    for number, run in enumerate(runs):
        grids = _grids(run, warn, STEPS_SHOWN)
        if grids and not blocks:
            blocks.append(
                Block(note="Samples that are never trained on, and what the model made of them at each step.")
            )
        pairs = zip(*(grid[:limit] for grid in grids.values()))  # noqa: B905  of all steps, as many as each has
        if grids:
            blocks.append(Block(_named(run, number), strips=[_strip(list(grids), list(pair)) for pair in pairs]))
    return blocks


def _grids(run: RunFolder, warn: Callable[[str], None], limit: int) -> dict[int, list]:
    """Returns, by step, what its picture holds of each pair; of at most `limit` steps."""
    grids = {}
    for step, path in _spread(run.pictures(), limit):
        try:
            grids[step] = read_grid(path)
        except OSError as error:
            warn(f"{path} is left out: {error}")
    return grids


def _strip(steps: list[int], pair: list[GridRow]) -> list[tuple[str, str, str]]:
    """Returns the images that are the same at all steps, then each step's reconstruction and captions."""
    last, cells = pair[-1], []
    for name, image in last.images.items():
        if name != PAINTED:
            cells.append((image, name, last.captions.get("true", "") if not cells else ""))
    for step, row in zip(steps, pair, strict=True):
        cells.append((row.images.get(PAINTED), f"step {step:,}", row.captions.get("written", "")))
    return [(image and data_url(image, "JPEG", quality=JPEG_QUALITY), title, text) for image, title, text in cells]


def captions(runs: Sequence[RunFolder]) -> list[Block]:
    """Shows what the model wrote for some held-out images, next to their true captions."""
    blocks = []
    for number, run in enumerate(runs):
        rows = [[row["written"], " / ".join(row["true"])] for row in _spread(run.captions, CAPTIONS_SHOWN)]
        if rows:
            blocks.append(Block(_named(run, number), tables=[(["written", "true"], rows)]))
    return blocks


# --- Restarts, bad samples, recipe ------------------------------------------------------------------------


def restarts(runs: Sequence[RunFolder]) -> list[Block]:
    """Shows seconds from the command to the first step, by phase, of the latest processes of each run."""
    tables = [(_named(run, number), _restarts_of(run)) for number, run in enumerate(runs)]
    return [Block(name, tables=[table]) for name, table in tables if table]


def _restarts_of(run: RunFolder) -> Table | None:
    prefix = "seconds/"
    launches = run.launches()[-LAUNCHES_SHOWN:]
    named = dict.fromkeys(name for launch in launches for name in launch if name.startswith(prefix))
    phases = [name for name in named if name != TO_FIRST_STEP]
    if not phases:
        return None
    seconds = [{name: launch.get(name) or 0.0 for name in phases} for launch in launches]
    rows = [[name.removeprefix(prefix).replace("_", " "), *(f"{s[name]:.2f}" for s in seconds)] for name in phases]
    totals = ["all", *(f"{sum(s.values()):.2f}" for s in seconds)]
    rows.append([Markup("<b>{}</b>").format(total) for total in totals])
    return ["seconds", *(f"{launch['event']}, step {launch['step']}" for launch in launches)], rows


def bad_sample_tables(runs: Sequence[RunFolder]) -> list[Block]:
    """Shows the samples that could not be used, by reason and by shard, and the latest entries."""
    if not any(run.bad_samples.entries for run in runs):
        return [Block(note="Every sample could be used.")]
    return [_bad_samples_of(run, number) for number, run in enumerate(runs)]


def _bad_samples_of(run: RunFolder, number: int) -> Block:
    bad = run.bad_samples
    if not bad.entries:
        return Block(_named(run, number), "Every sample could be used.")
    keys = ("position", "shard", "key", "reason")
    tables = [
        (["reason", "samples"], _counts(bad.reasons)),
        ([f"shard (of {len(bad.shards):,})", "samples"], _counts(bad.shards)),
        (["latest: position", *keys[1:]], [[str(entry.get(key, "")) for key in keys] for entry in bad.last]),
    ]
    return Block(_named(run, number), f"{bad.entries:,} samples were replaced.", tables=tables)


def _counts(counts: Counter[str]) -> list[list[str]]:
    return [[name, f"{count:,}"] for name, count in counts.most_common(SHARDS_SHOWN)]


def recipes(runs: Sequence[RunFolder]) -> list[Block]:
    """Shows what differs between the recipes, then everything."""
    known = [(number, run) for number, run in enumerate(runs) if run.recipe]
    if not known:
        return []
    names = sorted({name for _, run in known for name in run.recipe})
    differ = [name for name in names if len({json.dumps(run.recipe.get(name)) for _, run in known}) > 1]

    def table(chosen: list[str]) -> Table:
        rows = [[name, *(_value(run.recipe.get(name)) for _, run in known)] for name in chosen]
        return ["", *(_named(run, number) for number, run in known)], rows

    blocks = [Block(summary=f"All {len(names)} keys", tables=[table(names)])]
    if differ:
        blocks.insert(0, Block("What differs", tables=[table(differ)]))
    elif len(known) > 1:
        blocks.insert(0, Block(note="The recipes are the same."))
    return blocks


def _value(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


# --- Parts ------------------------------------------------------------------------------------------------


def _spread(items: Sequence[Any], limit: int) -> list[Any]:
    """Returns at most `limit` of the items, evenly, from the first to the last."""
    count = min(limit, len(items))
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def _named(run: RunFolder, number: int) -> Markup:
    """Returns the run's name next to its colour."""
    return Markup('<span class="run"><i class="training c{}"></i>{}</span>').format(number % COLOURS, run.name)
