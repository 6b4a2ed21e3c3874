"""The sections of the report, as HTML."""

import html
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from PIL import Image

from mug.run.reporting.chart import Line, can_be_log, draw, short
from mug.run.reporting.figures import SECTIONS, Figure, collect
from mug.run.reporting.page import data_url
from mug.run.reporting.runs import Row, RunFolder
from mug.run.training.pictures import COLUMNS, read_grid

COLOURS = 8  # of the style; later runs begin again
STEPS_SHOWN = 6  # pictures of a run, spread over training
PAIRS_SHOWN = 48  # held-out pairs in all pictures together, 8 a run at most
CAPTIONS_SHOWN = 8
LONG = 60  # characters, from which a cell of a table wants to be wide
SHARDS_SHOWN = 10
LIVES_SHOWN = 6
JPEG_QUALITY = 80
# Medians in the first table: name in the rows, title, format.
SUMMARIES = (
    ("images_per_s", "images a second, median", ".4g"),
    ("data_wait", "data wait, median", ".1%"),
    ("mfu", "model FLOPs utilisation, median", ".1%"),
)
TO_FIRST_STEP = "seconds/total"  # of a start or resume event; its parts are seconds/PHASE


def build(title: str, runs: Sequence[RunFolder], warn: Callable[[str], None]) -> str:
    """The body of the page. `warn` is told of pictures that cannot be read."""
    figures, x_label = collect(runs)
    sections = [
        ("Runs", overview(runs)),
        *((name, charts([f for f in figures if f.section == name], x_label, runs)) for name in SECTIONS[:1]),
        ("Transfer", transfer(runs)),
        ("Held-out pairs", pictures(runs, warn)),
        ("Captions", captions(runs)),
        *((name, charts([f for f in figures if f.section == name], x_label, runs)) for name in SECTIONS[1:]),
        ("Restarts", restarts(runs)),
        ("Data ledger", ledgers(runs)),
        ("Recipes", recipes(runs)),
    ]
    shown = [(name, body) for name, body in sections if body]
    links = " · ".join(f'<a href="#{_anchor(name)}">{name}</a>' for name, _ in shown)
    parts = [f'<section id="{_anchor(name)}"><h2>{name}</h2>{body}</section>' for name, body in shown]
    return f"<h1>{html.escape(title)}</h1><nav>{links}</nav>{''.join(parts)}"


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


# --- Overview ---------------------------------------------------------------------------------------------


def overview(runs: Sequence[RunFolder]) -> str:
    facts = [_facts(run) for run in runs]
    names = dict.fromkeys(name for found in facts for name in found)
    rows = [[html.escape(name), *(found.get(name, "") for found in facts)] for name in names]
    return _table(["", *(_named(run.name, number) for number, run in enumerate(runs))], rows)


def _facts(run: RunFolder) -> dict[str, str]:
    """What stands about a run in the first table: HTML by name."""
    train, held_out, lives = run.of_kind("train"), run.of_kind("eval"), run.lives()
    facts: dict[str, Any] = {"steps": f"{max(row['step'] for row in run.rows):,}"}
    facts["model"] = run.recipe.get("model.preset")
    if positions := [row["position"] for row in train if "position" in row]:
        facts["samples seen"] = f"{positions[-1]:,}"
    if held_out:
        figures = {name: value for name, value in held_out[-1].items() if "/" in name and value is not None}
        facts["held out, last evaluation"] = _pairs(figures)
    for name, title, form in SUMMARIES:
        if values := [row[name] for row in run.rows if row.get(name) is not None]:
            facts[title] = format(statistics.median(values), form)
    facts["samples replaced"] = f"{run.ledger.entries:,}"
    facts |= _interruptions(run)
    if lives:
        latest = lives[-1]
        facts["device"] = latest.get("device")
        facts["ranks"], facts["ZeRO stage"] = latest.get("world_size"), latest.get("zero_stage")
        facts["versions"] = ", ".join(f"{n} {latest[n]}" for n in ("torch", "deepspeed", "timm") if n in latest)
    return {name: html.escape(str(value)) for name, value in facts.items() if value is not None}


def _interruptions(run: RunFolder) -> dict[str, str]:
    """What the run lost to starting again and to saving."""
    facts, lives = {}, run.lives()
    if goodput := [row["goodput"] for row in run.of_kind("train") if row.get("goodput") is not None]:
        facts["goodput"] = f"{goodput[-1]:.1%}"  # each is of the time since the first start
    if lives:
        facts["restarts"] = f"{len(lives) - 1}"
    if again := [life[TO_FIRST_STEP] for life in lives[1:] if TO_FIRST_STEP in life]:
        facts["restart to first step"] = f"{statistics.median(again):.1f} s, median"
    saves = [row for row in run.of_kind("event") if row.get("event") == "checkpoint"]
    if stalls := [row["seconds"] for row in saves if row.get("seconds") is not None]:
        facts["checkpoint stall"] = (
            f"{statistics.median(stalls):.2f} s, median of {len(stalls)}; {sum(stalls):.0f} s in all"
        )
    return facts


# --- Charts -----------------------------------------------------------------------------------------------


def charts(figures: Sequence[Figure], x_label: str, runs: Sequence[RunFolder]) -> str:
    marks = _resumes(runs) if x_label == "step" else []
    return f'<div class="charts">{"".join(_chart(f, x_label, marks) for f in figures)}</div>' if figures else ""


def _resumes(runs: Sequence[RunFolder]) -> list[tuple[float, int, str]]:
    return [
        (row["step"], number % COLOURS, f"{run.name} resumed after step {row['step']}")
        for number, run in enumerate(runs)
        for row in run.lives()
        if row["event"] == "resume"
    ]


def _chart(figure: Figure, x_label: str, marks: list[tuple[float, int, str]]) -> str:
    """Title, legend with the last values, and the chart, on a linear scale and where it helps a logarithmic one."""
    lines = [Line(one.label, one.colour % COLOURS, one.points, one.smooth, one.marked) for one in figure.lines]
    legend = "".join(_legend(line) for line in lines)
    log = can_be_log(lines)
    switch = '<label><input type="checkbox" class="log-switch"> log</label>' if log else ""
    drawn = draw(lines, x_label, marks) + (draw(lines, x_label, marks, log=True) if log else "")
    data = {"x": x_label, "series": [{"label": line.label, "points": line.points} for line in lines]}
    return (
        f'<figure class="chart"><figcaption><b>{html.escape(figure.title)}</b>{switch}</figcaption>'
        f'<ul class="legend">{legend}</ul>{drawn}'
        f'<script type="application/json">{_json(data)}</script></figure>'
    )


def _legend(line: Line) -> str:
    kind = "evaluation" if line.marked else "training"
    last = next((y for _, y in reversed(line.points) if y is not None), None)
    value = "" if last is None else short(last)
    return f'<li><i class="{kind} c{line.colour}"></i>{html.escape(line.label)} <output>{value}</output></li>'


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


# --- Transfer ---------------------------------------------------------------------------------------------


def transfer(runs: Sequence[RunFolder]) -> str:
    rows = [
        [
            _named(run.name, number),
            *(html.escape(str(row.get(name) or "")) for name in ("method", "data", "encoder")),
            html.escape(" ".join(str(row[name]) for name in ("feature", "setting") if row.get(name))),
            html.escape(_figures_of_result(row)),
        ]
        for number, run in enumerate(runs)
        for row in run.results
    ]
    return _table(["run", "method", "data", "encoder", "feature", "result"], rows) if rows else ""


def _figures_of_result(row: Row) -> str:
    """An accuracy with its intervals, in percent; of other methods all figures by name."""
    if "accuracy" not in row:
        return _pairs({name: value for name, value in row.items() if isinstance(value, int | float)})
    text = f"{row['accuracy']:.2%}"
    if row.get("deviation") is not None:
        text += f" ± {100 * row['deviation']:.2f} ({row['seeds']} seeds)"
    if row.get("test_interval"):
        low, high = row["test_interval"]
        text += f", 95% over test images {low:.2%} to {high:.2%}"
    return text


def _pairs(figures: Row) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


# --- Pictures and captions --------------------------------------------------------------------------------


def pictures(runs: Sequence[RunFolder], warn: Callable[[str], None]) -> str:
    most = max(1, min(8, PAIRS_SHOWN // len(runs)))
    return "".join(_pictures_of(run, number, most, warn) for number, run in enumerate(runs))


def _pictures_of(run: RunFolder, number: int, most: int, warn: Callable[[str], None]) -> str:
    """A row a held-out pair: what is there, what the encoder saw, and what it painted and wrote through training."""
    grids = {}
    for step, path in _spread(run.pictures(), STEPS_SHOWN):
        try:
            grids[step] = read_grid(path)
        except OSError as error:
            warn(f"{path} is left out: {error}")
    if not grids:
        return ""
    pairs = zip(*(grid[:most] for grid in grids.values()))  # noqa: B905  of all steps, as many as each has
    strips = "".join(_strip(list(grids), list(pair)) for pair in pairs)
    return f"<h3>{_named(run.name, number)}</h3>{strips}"


def _strip(steps: list[int], pair: list[tuple[list[Image.Image], dict[str, str]]]) -> str:
    (original, masked, _), captions = pair[-1]
    cells = [_picture(original, COLUMNS[0], captions.get("true", "")), _picture(masked, COLUMNS[1], "")]
    for step, ((_, _, painted), captions) in zip(steps, pair, strict=True):
        cells.append(_picture(painted, f"step {step:,}", captions.get("written", "")))
    return f'<div class="strip">{"".join(cells)}</div>'


def _picture(image: Image.Image, title: str, text: str) -> str:
    url = data_url(image, "JPEG", quality=JPEG_QUALITY)
    return f'<figure><img alt="" src="{url}"><figcaption><b>{title}</b> {html.escape(text)}</figcaption></figure>'


def captions(runs: Sequence[RunFolder]) -> str:
    """What run/caption_eval.py wrote for some held-out images, beside their true captions."""
    parts = []
    for number, run in enumerate(runs):
        shown = _spread(run.captions, CAPTIONS_SHOWN)
        rows = [[html.escape(row["written"]), html.escape(" / ".join(row["true"]))] for row in shown]
        if rows:
            parts.append(f"<h3>{_named(run.name, number)}</h3>{_table(['written', 'true'], rows)}")
    return "".join(parts)


# --- Restarts, ledger, recipe -----------------------------------------------------------------------------


def restarts(runs: Sequence[RunFolder]) -> str:
    """Seconds from the command to the first step, by phase, of the latest processes of each run."""
    return "".join(_restarts_of(run, number) for number, run in enumerate(runs))


def _restarts_of(run: RunFolder, number: int) -> str:
    prefix = "seconds/"
    lives = run.lives()[-LIVES_SHOWN:]
    named = dict.fromkeys(name for life in lives for name in life if name.startswith(prefix))
    phases = [name for name in named if name != TO_FIRST_STEP]
    if not phases:
        return ""
    seconds = [{name: life.get(name) or 0.0 for name in phases} for life in lives]
    rows = [[name.removeprefix(prefix).replace("_", " "), *(f"{s[name]:.2f}" for s in seconds)] for name in phases]
    rows.append(["<b>all</b>", *(f"<b>{sum(s.values()):.2f}</b>" for s in seconds)])
    heads = [f"{life['event']}, step {life['step']}" for life in lives]
    return f"<h3>{_named(run.name, number)}</h3>{_table(['seconds', *heads], rows)}"


def ledgers(runs: Sequence[RunFolder]) -> str:
    """What could not be used, by reason and by shard, and the latest entries."""
    if not any(run.ledger.entries for run in runs):
        return "<p>Every sample could be used.</p>"
    return "".join(_ledger_of(run, number) for number, run in enumerate(runs))


def _ledger_of(run: RunFolder, number: int) -> str:
    ledger = run.ledger
    head = f"<h3>{_named(run.name, number)}</h3>"
    if not ledger.entries:
        return f"{head}<p>Every sample could be used.</p>"
    keys = ("position", "shard", "key", "reason")
    last = [[html.escape(str(entry.get(key, ""))) for key in keys] for entry in ledger.last]
    return (
        f"{head}<p>{ledger.entries:,} samples were replaced.</p>"
        + _table(["reason", "samples"], _counts(ledger.reasons.most_common(SHARDS_SHOWN)))
        + _table([f"shard (of {len(ledger.shards):,})", "samples"], _counts(ledger.shards.most_common(SHARDS_SHOWN)))
        + _table(["latest: position", *keys[1:]], last)
    )


def _counts(counts: Iterable[tuple[str, int]]) -> list[list[str]]:
    return [[html.escape(name), f"{count:,}"] for name, count in counts]


def recipes(runs: Sequence[RunFolder]) -> str:
    """What differs between the runs, then everything."""
    known = [(number, run) for number, run in enumerate(runs) if run.recipe]
    if not known:
        return ""
    names = sorted({name for _, run in known for name in run.recipe})
    differ = [name for name in names if len({json.dumps(run.recipe.get(name)) for _, run in known}) > 1]
    heads = ["", *(_named(run.name, number) for number, run in known)]

    def table(chosen: list[str]) -> str:
        return _table(heads, [[name, *(_value(run.recipe.get(name)) for _, run in known)] for name in chosen])

    if len(known) < 2:
        differences = ""
    elif differ:
        differences = f"<h3>What differs</h3>{table(differ)}"
    else:
        differences = "<p>The recipes are the same.</p>"
    return f"{differences}<details><summary>All {len(names)} keys</summary>{table(names)}</details>"


def _value(value: Any) -> str:
    return html.escape("" if value is None else value if isinstance(value, str) else json.dumps(value))


# --- Parts ------------------------------------------------------------------------------------------------


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly, from the first to the last."""
    count = min(most, len(items))
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def _named(name: str, number: int) -> str:
    return f'<span class="run"><i class="training c{number % COLOURS}"></i>{html.escape(name)}</span>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: str) -> str:
    return f'<td class="wide">{cell}</td>' if len(cell) > LONG else f"<td>{cell}</td>"
