"""The report page against the rows it was made of: its curves are read back through the labels of their axes."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_script
from PIL import Image

from mug.run import report
from mug.run.common.errors import RunError
from mug.run.reporting import sections
from mug.run.reporting.chart import LEFT, RIGHT, WIDTH, Line, draw, smoothed, thinned
from mug.run.reporting.grid import Picture, draw_grid, read_grid
from mug.run.reporting.grid import Row as GridRow
from mug.run.reporting.runs import open_runs
from mug.run.state.checkpoint import commit, open_partial

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STEPS = range(10, 110, 10)
COLUMNS = ("original", "masked", "reconstruction")


def train_row(step: int, pixels: float | None) -> dict:
    metrics = {"loss/pixels": pixels, "images_per_s": 1000.0 + step, "data_wait": 0.01, "strange_metric": step**2}
    return {"kind": "train", "step": step, "position": 4 * step, **metrics}


def make_run(folder: Path, scale: float, recipe: dict) -> list[dict]:
    """A run's folder with everything in it, and its rows."""
    life = {"position": 0, "world_size": 2, "zero_stage": 3, "device": "CPU"}
    life |= {"seconds/imports": 2.5, "seconds/data": 1, "seconds/total": 3.5}
    rows = [{"kind": "event", "step": 0, "event": "start", **life}]
    rows += [train_row(step, None if step == 50 else scale / step) for step in STEPS]
    rows += [
        {"kind": "eval", "step": step, "position": 4 * step, "loss/pixels": 2 * scale / step} for step in (50, 100)
    ]
    rows.append({"kind": "event", "step": 60, "event": "checkpoint", "seconds": 0.5})
    rows.append({"kind": "event", "step": 60, "event": "resume", **life})
    (folder / "samples").mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"kind": "train", "st')  # a crash cut the last
    open_partial(folder, 60)
    commit(folder, 60, {}, {"recipe": recipe}, {}, keep=1)
    bad = [(3, "a.tar", "damaged"), (8, "b.tar", "<too> large"), (9, "a.tar", "damaged")]
    bad_samples = [{"position": p, "shard": s, "key": f"key{p}", "reason": r, "shard_samples": 5} for p, s, r in bad]
    (folder / "bad_samples.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in bad_samples))
    knn = {"method": "kNN", "encoder": "e", "data": "d", "feature": "f", "setting": "k = 10", "seeds": 3}
    knn |= {"accuracy": 0.5, "deviation": 0.01, "test_interval": [0.4, 0.6]}
    results = [{**knn, "accuracy": 0.1}, knn, {"method": "captions", "encoder": "e", "data": "d", "BLEU-4": 12.345}]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in results))
    for step in (50, 100):
        shades = [torch.full((3, 16, 16), shade, dtype=torch.uint8) for shade in (10, 128, step)]
        captions = {"written": f"a <b> at {step}", "true": "the truth"}
        draw_grid([Picture(dict(zip(COLUMNS, shades, strict=True)), captions)], folder / "samples" / f"step-{step}.png")
    return rows


def start(*arguments: object) -> subprocess.CompletedProcess:
    return run_script("run/report.py", *arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, list[dict]]]:
    """The page of two runs, as a user makes it, and the rows of both."""
    folder = tmp_path_factory.mktemp("report")
    recipe = {"trainer": {"global_batch": 4, "lr": 0.1}, "seed": 0}
    rows = {
        "one": make_run(folder / "one", 9.0, recipe),
        "two": make_run(folder / "two", 4.0, {**recipe, "trainer": {"global_batch": 4, "lr": 0.2}}),
    }
    done = start(folder / "one", folder / "two", "--out", folder / "page.html")
    assert done.returncode == 0, done.stderr
    assert f"{folder / 'page.html'}: 2 run(s)" in done.stdout
    return folder / "page.html", rows


def chart(page: str, title: str) -> str:
    return re.search(
        rf'<figure class="chart"><figcaption><b>{re.escape(title)}</b>.*?</figure>', page, re.DOTALL
    ).group()


def number(label: str) -> float:
    return float(label.replace("k", "e3").replace("M", "e6"))


def drawn(figure: str, scale: str) -> list[list[tuple[float, float]]]:
    """The points of each curve, in the units that the tick labels of both axes state."""
    svg = ET.fromstring(re.search(rf'<svg class="{scale}".*?</svg>', figure).group())
    texts = {kind: [t for t in svg.iter("text") if t.get("class") == kind] for kind in ("x", "y")}
    y_ticks = [(float(t.get("y")) - 3.5, number(t.text)) for t in texts["y"]]
    x_ticks = [(float(t.get("x")), number(t.text)) for t in texts["x"]]
    straight = math.log if scale == "log" else float
    to_y = np.polyfit([p for p, _ in y_ticks], [straight(v) for _, v in y_ticks], 1)
    to_x = np.polyfit(*zip(*x_ticks, strict=True), 1)
    back = math.exp if scale == "log" else float
    curves = []
    for path in (p for p in svg.iter("path") if p.get("class") == "curve"):
        pairs = re.findall(r"([\d.]+) ([\d.]+)", path.get("d"))
        curves.append([(np.polyval(to_x, float(x)), back(np.polyval(to_y, float(y)))) for x, y in pairs])
    return curves


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_curves_lie_where_the_axes_say(made, scale):
    page, rows = made
    curves = drawn(chart(page.read_text(), "Masked pixels: loss"), scale)
    assert len(curves) == 4
    kinds = [(name, kind) for name in rows for kind in ("train", "eval")]
    for (name, kind), curve in zip(kinds, curves, strict=True):
        true = [
            (row["step"], row["loss/pixels"])
            for row in rows[name]
            if row["kind"] == kind and row["loss/pixels"] is not None
        ]
        assert len(curve) == len(true) == (9 if kind == "train" else 2)
        np.testing.assert_allclose(curve, true, rtol=0.03, atol=0.01)


def test_a_value_that_was_not_finite_leaves_a_gap(made):
    path = re.search(
        r'class="training c0"><path class="curve" d="(.*?)"', chart(made[0].read_text(), "Masked pixels: loss")
    )
    assert [len(part.split("L")) for part in path.group(1).split("M")[1:]] == [4, 5]


def test_every_metric_of_the_rows_is_there_by_value(made):
    page, rows = made
    text = page.read_text()
    for title, name in (("Images per second", "images_per_s"), ("strange metric", "strange_metric")):
        data = json.loads(re.search(r'type="application/json">(.*?)</script>', chart(text, title)).group(1))
        points = [[row["step"], row[name]] for row in rows["two"] if row["kind"] == "train"]
        assert data["x"] == "step" and data["series"][1] == {"label": "two", "points": points}
    assert chart(text, "Images per second").count("<output>1100</output>") == 2, "the last value"
    assert "resumed after step 60" in chart(text, "Images per second")
    assert [
        points[0][0] for points in drawn(chart(text, "Checkpoint: seconds that training stood still"), "linear")
    ] == [pytest.approx(60, abs=1)] * 2


def cells(page: str, heading: str) -> list[list[str]]:
    """The text of the cells of the first table after a heading."""
    table = re.search(r"<table>.*?</table>", page[page.index(heading) :], re.DOTALL).group()
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)] for row in rows]


def test_tables_say_what_the_folders_hold(made):
    page = made[0].read_text()
    overview = {row[0]: row[1:] for row in cells(page, "<h2>Runs")}
    assert overview["samples seen"] == ["400", "400"] and overview["samples replaced"] == ["3", "3"]
    assert overview["images a second, median"] == ["1055", "1055"] and overview["data wait, median"] == ["1.0%"] * 2
    transfer = cells(page, "<h2>Transfer")[1:]
    assert len(transfer) == 4, "of results measured twice, the later"
    assert transfer[0] == [
        "one",
        "kNN",
        "d",
        "e",
        "f k = 10",
        "50.00% ± 1.00 (3 seeds), 95% over test images 40.00% to 60.00%",
    ]
    assert transfer[3][1:] == ["captions", "d", "e", "", "BLEU-4 12.35"]
    assert cells(page, "<h2>Bad samples")[1:] == [["damaged", "2"], ["&lt;too&gt; large", "1"]]
    assert cells(page, "shard (of 2)") and "key9" in page
    assert cells(page, "What differs") == [["", "one", "two"], ["trainer.lr", "0.1", "0.2"]]
    assert cells(page, "<h2>Restarts")[1:] == [
        ["imports", "2.50", "2.50"],
        ["data", "1.00", "1.00"],
        ["all", "3.50", "3.50"],
    ]


def test_what_interruptions_and_saves_cost(tmp_path):
    """Restarts alone count for their time, not the first start; the goodput is the last, which is of the whole run."""
    seconds = {"start": [100.0], "resume": [20.0, 26.0, 70.0], "checkpoint": [0.5, 0.25, 3.0, 0.25]}
    rows = [train_row(step, 1.0) | {"goodput": goodput} for step, goodput in ((1, 0.9), (2, 0.2), (3, 0.625))]
    for event, values in seconds.items():
        name = "seconds" if event == "checkpoint" else "seconds/total"
        rows += [{"kind": "event", "step": 2, "event": event, name: value} for value in values]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = sections.build("title", open_runs([str(tmp_path)]), warn=pytest.fail)
    overview = dict(row for row in cells(page, "<h2>Runs") if row[0])
    assert overview["goodput: time that advanced the run"] == "62.5%"
    assert overview["restarts"] == "3"
    assert overview["restart to first step"] == "26.0 s, median"
    assert overview["checkpoint stall"] == "0.38 s, median of 4; 4.0 s in all"


def test_pictures_and_captions_of_every_evaluation(made):
    page = made[0].read_text()
    strips = re.findall(r'<div class="strip">.*?</div>', page, re.DOTALL)
    assert len(strips) == 2
    encoded = re.findall(r'src="data:image/jpeg;base64,(.*?)"', strips[0])
    shades = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).mean() for text in encoded]
    assert shades == pytest.approx([10, 128, 50, 100], abs=2)
    texts = re.findall(r"<figcaption><b>(.*?)</b> (.*?)</figcaption>", strips[0])
    written = [(f"step {step}", f"a &lt;b&gt; at {step}") for step in (50, 100)]
    assert texts == [("original", "the truth"), ("masked", ""), *written]


def test_it_opens_with_the_latest_pictures_and_how_they_came_about(made):
    page = made[0].read_text()
    assert page.index("<h2>At a glance") < page.index("<h2>Runs")
    heroes = re.findall(r'<img class="hero" alt="(.*?)" src="data:image/(.*?);base64,(.*?)">', page)
    assert [(text, form) for text, form, _ in heroes] == 2 * [
        ("written: a &lt;b&gt; at 100, true: the truth", "png"),
        ("reconstructions through training", "webp"),
    ]
    moving = Image.open(io.BytesIO(base64.b64decode(heroes[1][2])))
    shades = []
    for frame in range(moving.n_frames):
        moving.seek(frame)
        shades.append(np.asarray(moving.convert("L"))[300, 100])  # of the reconstruction
    assert shades == pytest.approx([50, 100], abs=4)


def test_the_page_needs_nothing_else(made):
    page = made[0].read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "url(" not in page and "@import" not in page


def test_different_batches_are_compared_by_samples(tmp_path):
    for name, batch in (("small", 4), ("large", 8)):
        make_run(tmp_path / name, 1.0, {"trainer": {"global_batch": batch}})
    done = start(tmp_path / "small", tmp_path / "large", "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    curves = drawn(chart((tmp_path / "page.html").read_text(), "strange metric"), "linear")
    ends = [curve[-1][0] for curve in curves]
    assert ends == pytest.approx([400, 800], rel=0.02)


def test_a_run_that_has_only_just_begun(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(train_row(1, 0.5)) + "\n")
    done = start(tmp_path / "run", "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert drawn(chart(page, "Masked pixels: loss"), "linear") == [[pytest.approx((1, 0.5), rel=0.02)]]
    assert "Every sample could be used" in page
    assert not re.search("<h2>(Transfer|Held-out pairs|Captions|Recipes|Restarts)</h2>", page)


def test_thinning_keeps_peaks_gaps_and_ends():
    random = np.random.default_rng(0)
    points = [(x, float(y)) for x, y in enumerate(random.normal(size=20000))]
    points[7777], points[1234] = (7777, 50.0), (1234, None)
    few = thinned(points, 300)
    assert 290 < len(few) < 320 and set(few) <= set(points) and few == sorted(few, key=lambda point: point[0])
    finite = [y for _, y in points if y is not None]
    assert {few[0], few[-1]} == {points[0], points[-1]} and (1234, None) in few
    values = [y for _, y in few if y is not None]
    assert (max(values), min(values)) == (50.0, min(finite))


def test_smoothing_is_the_exponential_mean():
    values = np.random.default_rng(0).normal(size=100)
    ours = [y for _, y in smoothed(list(enumerate(values.tolist())))]
    weights = 0.5 ** (np.arange(100) / 2)  # half after a fiftieth of the points
    expected = [np.average(values[: n + 1], weights=weights[n::-1]) for n in range(100)]
    np.testing.assert_allclose(ours, expected)
    assert smoothed(list(enumerate(values[:20].tolist()))) == []


def test_a_grid_is_read_as_it_was_drawn(tmp_path):
    shades = [torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8) for _ in range(6)]
    for columns in (COLUMNS, COLUMNS[:1]):  # and of an objective that paints nothing
        pictures = [
            Picture(dict(zip(columns, shades[:3], strict=False)), {"written": "ä"}),
            Picture(dict(zip(columns, shades[3:], strict=False)), {}),
        ]
        draw_grid(pictures, tmp_path / "grid.png")
        read = read_grid(tmp_path / "grid.png")
        assert [row.captions for row in read] == [{"written": "ä"}, {}]
        for row, picture in zip(read, pictures, strict=True):
            assert list(row.images) == list(columns)
            for name, image in row.images.items():
                assert np.array_equal(np.asarray(image).transpose(2, 0, 1), picture.images[name].numpy())


def test_one_point_is_seen_and_zero_is_the_lowest_count():
    assert draw([Line("run", 0, [(20.0, 3.0)])], "step").count("<circle") == 1
    assert "<circle" not in draw([Line("run", 0, [(10.0, 3.0), (20.0, 3.0)])], "step")
    zero = draw([Line("run", 0, [(20.0, 0.0)])], "step")
    assert re.findall('<text class="y".*?>(.*?)</text>', zero) == ["0.0", "0.5", "1.0"]


def test_held_out_shares_of_captions_have_a_row_of_their_own(tmp_path):
    shares = {"correct/captions": 0.25, "correct/nouns": 0.5}
    rows = [
        train_row(20, 1.0) | {"images_per_s": 12194.0},
        {"kind": "eval", "step": 20, "loss/total": 2.0} | shares,
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = sections.build("title", open_runs([str(tmp_path)]), warn=pytest.fail)
    overview = dict(row for row in cells(page, "<h2>Runs") if row[0])
    assert overview["held out, last evaluation"] == "loss/total 2"
    assert overview["held-out captions"] == "captions entirely correct 25.0%, nouns 50.0%"
    assert overview["images a second, median"] == "12.19k"
    assert "Held out: on samples that are never trained on." in page and "Upright dashes" not in page


def test_a_strip_of_a_model_that_only_writes_has_a_caption_a_step():
    original = Image.new("RGB", (8, 8))
    rows = [GridRow({"original": original}, {"written": f"at {step}", "true": "a <b>"}) for step in (1, 2)]
    strip = sections._strip([1, 2], rows)
    assert [bool(url) for url, _, _ in strip] == [True, False, False]
    assert [cell[1:] for cell in strip] == [("original", "a <b>"), ("step 1", "at 1"), ("step 2", "at 2")]


def test_a_mistake_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "metrics.jsonl").write_text('[1, 2]\n{"a": 1}\n')
    make_run(tmp_path / "good", 1.0, {})
    for arguments, names in (
        ([], "runs"),
        ([tmp_path / "missing"], "missing: no such directory"),
        ([tmp_path / "good", tmp_path / "empty"], "empty does not hold a metrics.jsonl"),
        ([tmp_path / "strange"], "strange does not hold a metrics.jsonl with rows"),
        ([tmp_path / "good", tmp_path / "good" / "."], "good is named twice"),
        ([tmp_path / "good", "--out", tmp_path], "--out"),
    ):
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "page.html")]
        with pytest.raises(RunError) as refused:
            open_runs(report.parse([*map(str, arguments), *out]).runs)
        assert names in str(refused.value) and "\n" not in str(refused.value)
    done = start(tmp_path / "missing")
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0 and done.stderr.startswith("error: ")
    assert not (tmp_path / "page.html").exists()


# Runs in the page: says how wide it is, and what the legend says under a pointer at 0.6 of the first chart.
PROBE = """<script>
addEventListener("load", () => {
  const svg = document.querySelector("svg.linear"), box = svg.getBoundingClientRect();
  const at = share => box.left + box.width * (LEFT + share * (WIDTH - LEFT - RIGHT)) / WIDTH;
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: at(0.6) }));
  const outputs = [...document.querySelectorAll("output")].map(o => o.textContent);
  const said = `${outputs[0]} ${outputs[2]} ${svg.querySelector(".name").textContent}`;
  document.body.innerHTML = `<p id="said">${said}|${document.documentElement.scrollWidth}|${innerWidth}</p>`;
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_chromium_shows_it_without_a_complaint(made, tmp_path, width):
    """500 px is the least that headless Chromium's window takes."""
    probe = PROBE.replace("LEFT", str(LEFT)).replace("RIGHT", str(RIGHT)).replace("WIDTH", str(WIDTH))
    copy = tmp_path / "page.html"
    copy.write_text(made[0].read_text().replace("</html>", probe + "</html>"))
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/c",
    ]
    command = [CHROMIUM, *flags, f"--window-size={width},900", "--dump-dom", f"file://{copy}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    said, needed, offered = re.search(r'<p id="said">(.*?)</p>', done.stdout).group(1).split("|")
    assert said == "0.15 0.06667 step 60"
    assert int(needed) <= int(offered) <= width
