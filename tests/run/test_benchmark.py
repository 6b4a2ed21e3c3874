"""Studies: their commands are ones that the scripts take, jobs are not run twice, and tables hold what was found."""

import dataclasses
import errno
import json
import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import run_script
from encoded import encode
from PIL import Image
from train_commands import parse

from mug.data.builders.writers import Sample, write_shards
from mug.model.objectives.objective import objective_names
from mug.run import benchmark, build_shards, evaluate, train_tokenizer
from mug.run.common.errors import RestartRequested, RunError
from mug.run.reporting.markdown_tables import spread, table, write_section
from mug.run.studies import jobs
from mug.run.studies.config import BASELINES, METHODS, runnable
from mug.run.studies.jobs import Job, run_job, run_side_by_side, time_taken
from mug.run.studies.leaks import leaks
from mug.run.studies.plan import Plan
from mug.run.studies.results import Results, verdict
from mug.run.studies.statistics import Difference

STUDIES = sorted(benchmark.STUDIES.glob("*.yaml"))
PARSERS = {
    "build_shards.py": build_shards.parse,
    "train_tokenizer.py": train_tokenizer.parse,
    "pretrain.py": partial(parse, "pretrain"),
    "finetune.py": partial(parse, "finetune"),
    "evaluate.py": evaluate.parse,
}
SMALL = {
    "title": "Small",
    "sets": {
        "drawings": {"kind": "openmoji", "options": {"limit": 300, "held_out": 0.0}},
        "digits": {"kind": "digits", "options": {"held_out": 0.5}},
    },
    "pools": {"all": {"sets": ["drawings"]}, "wrong": {"sets": ["drawings"], "shuffled": True}},
    "model": {"image_size": 16, "patch_size": 8, "width": 24, "depth": 1, "heads": 3, "text_length": 8}
    | {"pixel_width": 16, "pixel_depth": 1, "pixel_heads": 2, "text_width": 24, "text_heads": 3, "text_layers": 1},
    "recipe": {"trainer": {"log_every": 1}},
    "encoders": {
        "MAE": {"objective": "mae"},
        "CLIP": {"objective": "clip", "recipe": {"trainer": {"weight_decay": 0.2}}},
        "CLIP, wrong": {"like": "CLIP", "pool": "wrong", "seeds": 1},
        "CLIP, cheap": {"like": "CLIP", "flops_of": "MAE"},
    },
    "judges": {"digits": {"set": "digits", "max_train": 100, "max_test": 50}},
    "frozen": {"knn": {"k": [10]}, "linear_probe": {"epochs": 12}},
    "comparisons": [["CLIP", "MAE"], ["CLIP", "CLIP, wrong"]],
    "grid": {"rates": [0.001, 0.002], "samples": 64, "set": "digits"},
    "samples": 128,
    "batch": 32,
    "seeds": 2,
}


class Silent:
    def __init__(self):
        self.said = []

    def info(self, line: str) -> None:
        self.said.append(line)


def write(path: Path, **changes: object) -> str:
    """A small study as a file."""
    path.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False), encoding="utf-8")
    return str(path)


@pytest.fixture
def small(tmp_path) -> Plan:
    """The plan of the small study."""
    study, out = write(tmp_path / "small.yaml"), tmp_path / "out"
    return Plan(benchmark.parse([study, "--out", str(out)]).study, out)


def pretend(plan: Plan) -> None:
    """Write what the jobs would: CLIP is ahead by 10 points, by 12 with the second seed; twice MAE's FLOP."""
    study = plan.study
    for name in study.encoders:
        for rate in study.grid.rates:
            found(plan, f"{name} rate {rate:g}", "digits", 0.5 + rate)
            log(plan.folder / "rates" / f"{name} rate {rate:g}".replace(" ", "_"), 2.0 if "CLIP" in name else 1.0)
        for seed in study.seeds_of(name):
            std = 0.15 if (name, seed) == ("MAE", 1) else 0.5
            found(plan, f"{name} {seed}", "digits", 0.6 + (name == "CLIP") * (0.1 + 0.02 * seed), std)
            log(plan.run(name, seed), 2.0 if "CLIP" in name else 1.0)
            record = plan.folder / "done" / f"pre-train {name} {seed}.json"
            record.parent.mkdir(exist_ok=True)
            record.write_text(json.dumps({"cpu_seconds": 7.0}), encoding="utf-8")
    for baseline in BASELINES:
        found(plan, baseline, "digits", 0.5)


def found(plan: Plan, label: str, judge: str, accuracy: float, std: float = 0.5) -> None:
    path = plan.found(label, judge)
    path.parent.mkdir(parents=True, exist_ok=True)
    right = round(50 * accuracy)
    hits = {"accuracy": accuracy, "values": [accuracy], "hits": ["1" * right + "0" * (50 - right)]}
    wrong = {"accuracy": 0.0, "values": [0.0], "hits": ["0" * 50]}
    features = [
        ("mean of patches", hits | {"std": std, "rank": 9.0}),
        ("class token", wrong | {"std": 0.0, "rank": 1.0}),
    ]
    rows = [{"method": method, "feature": name, **one} for method in METHODS.values() for name, one in features]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def log(run: Path, tflops: float) -> None:
    run.mkdir(parents=True, exist_ok=True)
    rows = [{"kind": "train", "step": 1, "images_per_s": 100.0, "tflops": tflops}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- The plan ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_can_be_read_and_names_what_is_missing(file):
    study, missing = runnable(benchmark.parse([str(file)]).study)
    assert study.encoders and not {study.objective(name) for name in study.encoders} & {*missing}
    assert all(name in study.encoders for pair in study.comparisons for name in pair)


def test_every_command_is_one_that_its_script_takes(small, monkeypatch):
    pretend(small)
    monkeypatch.setattr(Plan, "check_labels", lambda plan: None)  # there are no pictures
    recipes = {}
    for job in [job for chains in small.stages() for chain in chains for job in chain]:
        parsed = PARSERS[job.command[0]](job.command[1:])
        if job.command[0] == "pretrain.py":
            recipes[job.name.removeprefix("pre-train ")] = parsed.recipe
    assert len(recipes) == 4 + 7, "two rates of two encoders; two seeds of all, but for one of a control"
    clip, wrong, cheap = (recipes[f"CLIP{kind} 0"] for kind in ("", ", wrong", ", cheap"))
    assert clip.trainer.weight_decay == wrong.trainer.weight_decay == 0.2 and recipes["MAE 1"].seed == 1
    assert (clip.trainer.max_steps, cheap.trainer.max_steps) == (4, 2), "half the samples cost what MAE's do"
    assert clip.trainer.base_learning_rate == wrong.trainer.base_learning_rate == 0.002, "the better one"
    assert "pools/wrong" in str(wrong.data.shards) and "sets/drawings" in str(clip.data.shards)
    assert recipes["CLIP rate 0.001"].seed == 100 and recipes["CLIP rate 0.001"].trainer.max_steps == 2
    assert recipes["MAE 0"].model.width == 24 and not hasattr(recipes["MAE 0"].model, "text_width")


def test_seeds_run_in_rounds(small):
    assert [name for name, seed in small.runs() if seed == 0] == [*small.study.encoders]
    assert [seed for _, seed in small.runs()] == [0, 0, 0, 0, 1, 1, 1]


MISTAKES = {
    "unknown key": ({"sample": 3}, "sample"),
    "unknown set": ({"pools": {"all": {"sets": ["photos"]}}}, "pools.all.sets 'photos' is not one of drawings, digits"),
    "unknown encoder": ({"comparisons": [["CLIP", "FLIP"]]}, "comparisons 'FLIP' is not one of MAE, CLIP"),
    "two parents": ({"encoders": {"A": {"objective": "mae", "like": "A"}}}, "encoders.A must have either"),
    "like nothing": ({"encoders": {"A": {"like": "B"}}}, "encoders.A.like B must be an encoder"),
    "no grid": ({"grid": None}, "encoders.CLIP, cheap.flops_of needs a grid"),
    "unknown evaluation": ({"frozen": {"kmeans": {}}}, "'kmeans' is not one of the evaluations"),
    "no samples": ({"samples": 0}, "samples must be at least 1"),
    "one folder of two": (
        {"encoders": {"A B": {"objective": "mae"}, "A_B": {"objective": "clip"}}, "comparisons": []},
        "encoders 'A B' and 'A_B' have the same files, A_B: rename one",
    ),
    "a baseline's name": (
        {"encoders": {"untrained": {"objective": "mae"}}, "comparisons": []},
        "encoders 'untrained' and 'untrained' have the same files",
    ),
    "one file of two": (
        {"judges": {"the digits": {"set": "digits"}, "the/digits": {"set": "digits"}}},
        "judges and others 'the digits' and 'the/digits' have the same files, the_digits: rename one",
    ),
    "a set elsewhere": ({"sets": SMALL["sets"] | {"/home/me": {"kind": "digits"}}}, "sets '/home/me' is the name of a"),
    "a set above": ({"sets": SMALL["sets"] | {"..": {"kind": "digits"}}}, "sets '..' is the name of a folder"),
    "a pool of two words": ({"pools": {"all of it": {"sets": ["drawings"]}}}, "pools 'all of it' is the name of a"),
    "no pools": ({"pools": {}}, "pools is empty: give one or more"),
    "no judges": ({"judges": {}}, "judges is empty"),
    "no evaluations": ({"frozen": {}}, "frozen is empty"),
    "no sets": ({"pools": {"all": {"sets": []}, "wrong": {"sets": ["drawings"]}}}, "pools.all.sets is empty"),
    "no rates": ({"grid": SMALL["grid"] | {"rates": []}}, "grid.rates is empty"),
    "not of frozen encoders": (
        {"frozen": {"losses": {}}},
        "frozen.losses does not evaluate frozen encoders: give some",
    ),
    "one alone": ({"comparisons": [["CLIP"]]}, "comparisons ['CLIP'] must be two different encoders"),
    "three": ({"comparisons": [["CLIP", "MAE", "CLIP"]]}, "comparisons ['CLIP', 'MAE', 'CLIP'] must be two different"),
    "itself": ({"comparisons": [["CLIP", "CLIP"]]}, "comparisons ['CLIP', 'CLIP'] must be two different encoders"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_study_is_one_line(case, tmp_path):
    changes, message = MISTAKES[case]
    with pytest.raises(RunError) as refused:
        benchmark.parse([write(tmp_path / "wrong.yaml", **changes)])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_mistake_on_the_command_line_is_one_line(tmp_path):
    with pytest.raises(RunError, match=r"nowhere.yaml: no such study; there are .*quick.yaml"):
        benchmark.parse(["nowhere.yaml"])
    with pytest.raises(RunError, match="--out a b: choose a path without spaces"):
        benchmark.parse([write(tmp_path / "small.yaml"), "--out", "a b"])
    assert benchmark.parse([write(tmp_path / "small.yaml"), "--samples", "64"]).study.samples == 64


def test_objectives_that_do_not_exist_are_left_out_with_their_comparisons(tmp_path):
    encoders = SMALL["encoders"] | {"New": {"objective": "none_yet"}, "New, wrong": {"like": "New", "pool": "wrong"}}
    file = write(tmp_path / "new.yaml", encoders=encoders, comparisons=[["New", "MAE"], ["CLIP", "MAE"]])
    study, missing = runnable(benchmark.parse([file]).study)
    assert missing == ["none_yet"] and "none_yet" not in objective_names()
    assert [*study.encoders] == [*SMALL["encoders"]] and study.comparisons == [["CLIP", "MAE"]]


def test_the_equal_in_flop_of_one_that_is_left_out_is_left_out(tmp_path):
    encoders = SMALL["encoders"] | {"New": {"objective": "none_yet"}, "MAE, dear": {"like": "MAE", "flops_of": "New"}}
    study, missing = runnable(benchmark.parse([write(tmp_path / "new.yaml", encoders=encoders)]).study)
    assert missing == ["none_yet"] and [*study.encoders] == [*SMALL["encoders"]]


# --- Jobs -------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A command that adds a line to what it produces, and fails while there is a file `broken`."""
    source = "import pathlib, sys\nout = pathlib.Path(sys.argv[1])\n"
    source += "text = out.read_text() if out.exists() else ''\nout.write_text(text + 'x')\n"
    source += f"if pathlib.Path({str(tmp_path / 'broken')!r}).exists(): sys.exit('error: out of luck')\n"
    (tmp_path / "script.py").write_text(source)
    monkeypatch.setattr(jobs, "RUN", tmp_path)
    produced = tmp_path / "produced.txt"
    return lambda *more: Job("a part", ["script.py", str(produced), *more], produced)


def test_a_finished_job_is_not_run_again_unless_its_command_changed(tmp_path, script):
    console = Silent()
    for part, times in ((script(), 1), (script(), 1), (script("other"), 2)):
        run_job(part, tmp_path, console, {})
        assert len(console.said) == times
        assert (tmp_path / "produced.txt").read_text() == "x", "never added to what was there"


def test_a_job_is_run_again_where_what_it_reads_was_made_again(tmp_path, monkeypatch):
    """Run, then its judge: another number of samples trains again in the same folder, which the judge then reads."""
    (tmp_path / "copy.py").write_text(
        "import pathlib, sys\nout, text = sys.argv[1:3]\n"
        "source = pathlib.Path(text.split()[-1].replace('*', '0'))\n"
        "pathlib.Path(out).write_text(source.read_text() if source.exists() else text)\n"
    )
    monkeypatch.setattr(jobs, "RUN", tmp_path)
    run, ten, found = (tmp_path / name for name in ("run", "run0", "found"))

    def chain(samples: str) -> list[Job]:
        first = [Job("pre-train", ["copy.py", str(run), samples], run), Job("tenth", ["copy.py", str(ten), "-"], ten)]
        return [*first, Job("judge", ["copy.py", str(found), f"elsewhere/* {run}"], found)]

    said = []
    for samples in ("64", "64", "128", "128"):
        console = Silent()
        run_side_by_side([chain(samples)], tmp_path, console)
        said.append([line.split(",")[0] for line in console.said])
        assert found.read_text() == samples
    assert said == [["pre-train", "tenth", "judge"], [], ["pre-train", "judge"], []]


def test_what_is_not_the_studys_is_not_removed(tmp_path, script):
    (tmp_path / "produced.txt").write_text("mine")
    with pytest.raises(RunError, match=r"produced.txt is there, but is not this study's: move it, or choose another"):
        run_job(script(), tmp_path, Silent(), {})
    assert (tmp_path / "produced.txt").read_text() == "mine"


def test_a_damaged_record_is_one_of_no_job(tmp_path, script):
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "a part.json").write_text('{"command": [')
    assert jobs.finished(tmp_path) == []
    run_job(script(), tmp_path, Silent(), {})
    assert len(jobs.finished(tmp_path)) == 1


def test_a_job_that_fails_is_named_with_its_log_and_run_again(tmp_path, script):
    (tmp_path / "broken").touch()
    with pytest.raises(RunError, match=r"a part ended with status 1: error: out of luck \(full log: .*a part.log\)"):
        run_job(script(), tmp_path, Silent(), {})
    (tmp_path / "broken").unlink()
    run_job(script(), tmp_path, Silent(), {})
    assert (tmp_path / "produced.txt").read_text() == "x"


def test_a_job_that_resumes_finds_what_it_left(tmp_path, script):
    (tmp_path / "broken").touch()
    part = dataclasses.replace(script(), resumes=True)
    with pytest.raises(RunError):
        run_job(part, tmp_path, Silent(), {})
    (tmp_path / "broken").unlink()
    run_job(part, tmp_path, Silent(), {})
    assert (tmp_path / "produced.txt").read_text() == "xx"
    run_job(dataclasses.replace(script("other"), resumes=True), tmp_path, Silent(), {})
    assert (tmp_path / "produced.txt").read_text() == "x", "another command begins again"


def test_cpu_time_is_the_jobs_own(tmp_path, monkeypatch):
    (tmp_path / "spin.py").write_text("import time\nwhile time.process_time() < 0.5: pass\ntime.sleep(0.3)\n")
    monkeypatch.setattr(jobs, "RUN", tmp_path)
    run_side_by_side([[Job(name, ["spin.py"], tmp_path / name)] for name in ("a", "b")], tmp_path, Silent())
    spent = [record["cpu_seconds"] for record in jobs.finished(tmp_path)]
    assert len(spent) == 2 and all(0.5 <= seconds < 0.8 for seconds in spent)


def test_chains_run_side_by_side_and_their_jobs_in_order(tmp_path, monkeypatch):
    (tmp_path / "meet.py").write_text(
        "import pathlib, sys, time\nmine, other = map(pathlib.Path, sys.argv[1:])\nmine.touch()\n"
        "until = time.time() + 60\nwhile not other.exists() and time.time() < until: time.sleep(0.01)\n"
        "sys.exit(0 if other.exists() else 'error: alone')\n"
    )
    monkeypatch.setattr(jobs, "RUN", tmp_path)
    monkeypatch.setattr(jobs, "parallelism", lambda: 2)
    one, two, last = (str(tmp_path / name) for name in ("one", "two", "last"))
    nothing = tmp_path / "nothing"
    chains = [
        [Job("a", ["meet.py", one, two], nothing), Job("b", ["meet.py", last, last], nothing)],
        [Job("c", ["meet.py", two, one], nothing)],  # ends only while `a` runs
    ]
    console = Silent()
    run_side_by_side(chains, tmp_path, console)
    names = [line.split(",")[0] for line in console.said]
    assert sorted(names) == ["a", "b", "c"] and names.index("a") < names.index("b")


def test_after_a_failure_no_further_job_begins(tmp_path, script, monkeypatch):
    monkeypatch.setattr(jobs, "parallelism", lambda: 1)
    (tmp_path / "broken").touch()
    first, second, third = (dataclasses.replace(script(), name=name) for name in ("one", "two", "three"))
    with pytest.raises(RunError, match="one ended with status 1"):
        run_side_by_side([[first, second], [third]], tmp_path, Silent())
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["one.log"]


def test_a_full_disk_ends_the_other_chains_too(tmp_path, monkeypatch):
    begun = []

    def run_job(part: Job, *_) -> None:
        begun.append(part.name)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs, "parallelism", lambda: 1)
    monkeypatch.setattr(jobs, "run_job", run_job)
    with pytest.raises(OSError, match="No space left"):
        run_side_by_side([[Job("one", [], tmp_path)], [Job("two", [], tmp_path)]], tmp_path, Silent())
    assert begun == ["one"]


def test_after_an_interrupt_no_further_chain_begins(tmp_path, monkeypatch):
    begun = []

    def run_job(part: Job, *_) -> None:
        begun.append(part.name)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)

    monkeypatch.setattr(jobs, "parallelism", lambda: 1)
    monkeypatch.setattr(jobs, "run_job", run_job)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs in the background ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_side_by_side([[Job(name, [], tmp_path)] for name in ("one", "two", "three")], tmp_path, Silent())
    finally:
        signal.signal(signal.SIGINT, old)
    assert begun == ["one"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_study_that_is_asked_to_stop_ends_its_jobs(tmp_path, monkeypatch, number):
    """The job's record has no end: the next start runs it again."""
    began, old = tmp_path / "began", signal.getsignal(number)
    (tmp_path / "sleep.py").write_text(f"import time\nopen({str(began)!r}, 'w')\ntime.sleep(60)", encoding="utf-8")
    monkeypatch.setattr(jobs, "RUN", tmp_path)

    def ask() -> None:
        while not began.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    benchmark.stop_when_asked()
    try:
        asking.start()
        with pytest.raises(RestartRequested, match=f"stopped by {number.name}; the same command continues"):
            run_side_by_side([[Job("sleep", ["sleep.py"], tmp_path / "made")]], tmp_path, Silent())
    finally:
        asking.join()
        signal.signal(number, old)
    assert "ended" not in json.loads((tmp_path / "done" / "sleep.json").read_text(encoding="utf-8"))


def test_time_counts_once_and_not_in_pauses():
    spans = [(10, 20), (0, 4), (12, 15), (18, 25), (30, 31)]
    assert time_taken([{"began": began, "ended": ended} for began, ended in spans]) == 4 + 15 + 1


# --- Tables -----------------------------------------------------------------------------------------------


def test_the_tables_hold_what_was_found(small, monkeypatch):
    pretend(small)
    monkeypatch.setattr("mug.run.studies.results.groups_of", lambda shards, judge: [*map(str, range(50))])
    monkeypatch.setattr("mug.run.studies.results.leaks", lambda plan: (["judge"], [["no pictures here"]]))
    results = Results(small)
    head, rows = results.accuracy()
    assert head == ["encoder", "seeds", "digits", "mean", "mean - untrained"]
    assert rows[0][2] == "60.0 / 60.0, collapsed with 1 of 2 seeds (std 0.15, rank 9.0)"
    assert rows[1] == ["CLIP", "2", "71.0 / 71.0", "71.00 ± 1.41", "+21.00"]
    assert rows[2] == ["CLIP, wrong", "1", "60.0 / 60.0", "60.00", "+10.00"]
    assert rows[-1] == ["untrained", "1", "50.0 / 50.0", "50.00", "+0.00"]
    (_, ahead), (_, wrong) = ((row[0], row[2]) for row in results.comparisons()[1])
    assert re.fullmatch(r"\+11\.00 ± 2\d\.\d\d, not separable", ahead), "t with one degree of freedom is 25.5 at 2.5%"
    assert wrong == "+10.00, one seed: no interval"
    costs = {row[0]: row[1:] for row in results.costs()[1]}
    assert costs["MAE"] == ["128", "1.3", "1.00", "7", "100", "0.002 (edge of the grid)"]
    assert costs["CLIP"][2] == "2.00" and costs["CLIP, cheap"][:3] == ["64", "1.3", "1.00"]
    page = results.html("`what` was run")
    assert "71.00 ± 1.41" in page and "what was run" in page and "not separable" in page


def test_a_picture_in_the_pool_is_found_by_bytes_and_by_looks(small):
    """The judge has a picture of the pool, the same one scaled and compressed, one of its own, and a blank one."""

    def picture(size: int = 64, form: str = "PNG", seed: int | None = 0) -> bytes:
        cells = np.full((9, 9), 200) if seed is None else np.random.default_rng(seed).integers(0, 255, (9, 9))
        image = Image.fromarray(cells.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        return encode(image, form)

    for name, split, images in (
        ("drawings", "train", [picture(), picture(seed=1), picture(seed=None)]),
        ("digits", "held_out", [picture(), picture(96, "JPEG"), picture(seed=2), picture(50, seed=None)]),
    ):
        folder = small.folder / "sets" / name
        folder.mkdir(parents=True)
        extensions = ["jpg" if image.startswith(b"\xff") else "png" for image in images]
        both = zip(images, extensions, strict=True)
        samples = [Sample(f"{i}", image, extension, "", {}) for i, (image, extension) in enumerate(both)]
        list(write_shards(samples, folder, f"{split}-", "tar", 10))
    assert leaks(small)[1] == [["digits", "4", "1", "2"]]


@pytest.mark.parametrize("key", ["label", "group"])
def test_labels_that_are_missing_are_found_before_anything_is_trained(tmp_path, key):
    judges = {"digits": {"set": "digits", key: "kind"}}
    file = write(tmp_path / "small.yaml", judges=judges)
    plan = Plan(benchmark.parse([file, "--out", str(tmp_path / "out")]).study, tmp_path / "out")
    picture = encode(Image.new("RGB", (16, 16)), "PNG")
    for split in ("train", "held_out"):
        folder = plan.folder / "sets" / "digits"
        folder.mkdir(parents=True, exist_ok=True)
        list(
            write_shards([Sample("one", picture, "png", "", {"label": "1", "key": "1"})], folder, f"{split}-", "tar", 1)
        )
    stages = plan.stages()
    next(stages)  # builds the sets
    with pytest.raises(RunError, match=rf"judges\.digits\.{key} is kind: .*'one': its json has no 'kind'"):
        next(stages)


def test_pictures_without_captions_need_no_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(Plan, "check_labels", lambda plan: None)
    file = write(tmp_path / "small.yaml", encoders={"MAE": {"objective": "mae"}}, comparisons=[], grid=None)
    plan = Plan(benchmark.parse([file, "--out", str(tmp_path / "out")]).study, tmp_path / "out")
    names = [job.name for chains in plan.stages() for chain in chains for job in chain]
    assert "pre-train MAE 0" in names and "train tokenizer" not in names


def test_columns_of_one_evaluation_share_its_run(tmp_path):
    """Two metrics of it, and a third of other options; CLIP writes no captions, and its cell is empty."""
    asked, few = {"eval": "information", "options": {"limit": 200}}, {"limit": 150}
    others = {
        "near": asked | {"metric": "information/embeddings"},
        "told": asked | {"metric": "information/captions"},
        "few": asked | {"metric": "information/embeddings", "options": few},
    }
    encoders = {"CLIP": {"objective": "clip"}, "CoCa": {"objective": "coca"}}
    file = write(tmp_path / "small.yaml", others=others, encoders=encoders, comparisons=[], seeds=1, grid=None)
    plan = Plan(benchmark.parse([file, "--out", str(tmp_path / "out")]).study, tmp_path / "out")
    jobs_of_coca = [job.name for job in plan._encoder("CoCa", 0)]
    assert jobs_of_coca[-2:] == ["near, CoCa 0", "few, CoCa 0"]
    rows = {("CLIP 0", "near"): {"information/embeddings": 1.0}, ("CLIP 0", "few"): {"information/embeddings": 3.0}}
    rows[("CoCa 0", "near")] = {"information/embeddings": 1.5, "information/captions": 2.5}
    for (label, heading), row in rows.items():
        path = plan.found(label, heading)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert Results(plan).further()[1] == [["CLIP", "1.000", "", "3.000"], ["CoCa", "1.500", "2.500", ""]]


def test_a_picture_that_cannot_be_used_is_not_looked_for(small, caplog):
    for name, split in (("drawings", "train"), ("digits", "held_out")):
        folder = small.folder / "sets" / name
        folder.mkdir(parents=True)
        whole = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)), "PNG")
        samples = [Sample("cut", whole[:60], "png", "", {}), Sample("whole", whole, "png", "", {})]
        list(write_shards(samples, folder, f"{split}-", "tar", 10))
    assert leaks(small)[1] == [["digits", "1", "1", "1"]]
    assert "1 pictures cannot be used and are not looked for; the first: " in caplog.text and "cut" in caplog.text


def test_the_cost_of_an_encoder_whose_name_has_a_slash(tmp_path):
    file = write(tmp_path / "slash.yaml", encoders={"MAE w/o text": {"objective": "mae"}}, comparisons=[])
    plan = Plan(benchmark.parse([file, "--out", str(tmp_path / "out")]).study, tmp_path / "out")
    log(plan.run("MAE w/o text", 0), 2.0)
    log(plan.run("MAE w/o text", 1), 2.0)
    for seed in (0, 1):
        record = Job(f"pre-train MAE w/o text {seed}", [], tmp_path).file(plan.folder, "done", "json")
        record.parent.mkdir(exist_ok=True)
        record.write_text(json.dumps({"cpu_seconds": 7.0 + 2 * seed}), encoding="utf-8")
    assert Results(plan).cost("MAE w/o text") == {"images/s": 100.0, "GFLOP": 20.0, "CPU s": 8.0}


def test_a_verdict_is_in_the_cell():
    clear, noisy = Difference(0.02, 5, 0.001, 0.001), Difference(0.002, 5, 0.001, 0.0)
    assert verdict(clear, 0.004, True) == "**+2.00 ± 0.40**"
    assert verdict(noisy, 0.005, False) == "+0.20 ± 0.50, not separable"


def test_a_section_is_replaced_and_others_stay(tmp_path):
    path = tmp_path / "docs" / "results.md"
    write_section(path, "One (quick)", "first")
    write_section(path, "Two", "second\n\n### Below\n\ntext")
    write_section(path, "One (quick)", r"new \1 text")
    assert path.read_text() == (
        "# Results\n\n## One (quick)\n\nnew \\1 text\n\n## Two\n\nsecond\n\n### Below\n\ntext\n"
    )
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert spread([0.5]) == "50.00"


@pytest.mark.slow
def test_a_study_runs_whole_is_not_run_twice_and_writes_table_and_page(tmp_path, monkeypatch):
    """Grid, curve, equal FLOP, fine-tuning and further evaluations: every path, as its commands run it."""
    encoders = {"CLIP": {"objective": "clip"}, "CapPa": {"objective": "cappa"}}
    encoders["CapPa, wrong"] = {"like": "CapPa", "pool": "wrong", "flops_of": "CLIP"}
    digits, limits = {"kind": "digits", "options": {"held_out": 0.5, "samples_per_shard": 200}}, {"max_train": 100}
    limits["max_test"] = 50
    rates = {"trainer": {"global_batch": 64, "micro_batch": 64, "warmup_samples": 0}}
    named = {"data": "{sets}/digits/held_out-*.tar", "templates": ["{}"]}
    study = {
        "encoders": encoders,
        "sets": SMALL["sets"] | {"digits": digits},
        "comparisons": [["CLIP", "CapPa"]],
        "grid": SMALL["grid"] | limits,
        "seeds": 1,
        "curve": 2,
        "finetune": {"train": "digits", "test": "digits", "rates": [0.001], "epochs": 1.0, "recipe": rates},
        "others": {
            "zero shot": {"eval": "zero_shot", "metric": "accuracy/zero shot", "options": named},
            "by likelihood": {
                "eval": "likelihood_zero_shot",
                "metric": "accuracy/zero shot by likelihood",
                "options": named,
            },
        },
    }
    options = benchmark.parse([write(tmp_path / "whole.yaml", **study), "--out", str(tmp_path / "out")])
    plan, called = Plan(options.study, options.out), []

    def call(command: list[str], log: Path) -> tuple[int, float]:
        script, environment = str(Path(command[1]).relative_to(jobs.RUN.parent)), os.environ | {"OMP_NUM_THREADS": "1"}
        done = run_script(script, *command[2:], env=environment)
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        called.append(command)
        return done.returncode, 1.0

    monkeypatch.setattr(jobs, "call", call)  # without importing everything for each command
    monkeypatch.setattr(jobs, "parallelism", lambda: 1)
    for _ in range(2):
        for chains in plan.stages():
            run_side_by_side(chains, plan.folder, Silent())
    assert len(called) == len({*map(tuple, called)}), "nothing is run twice"
    benchmark.write_results(options, plan, Silent())
    text, page = ((options.out / name).read_text(encoding="utf-8") for name in ("results.md", "study.html"))
    assert "## Small" in text and "Learning curves" in page
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert re.fullmatch(r"[+-]\d+\.\d\d, one seed: no interval", next(r[2] for r in rows if r[0] == "CLIP - CapPa"))
    untrained = next(row for row in rows if row[0] == "untrained")
    cells = re.match(r"([\d.]+) / ([\d.]+)", untrained[2]).groups()
    assert all(0 < float(cell) < 100 for cell in cells) and untrained[-1] == "+0.00"
    further = {row[0]: row[1:] for row in rows[[row[0] for row in rows].index("from scratch") - 3 :][:4]}
    assert [*further] == [*encoders, "from scratch"] and all(0 < float(row[0]) < 100 for row in further.values())
    assert float(further["CLIP"][2]) > 0 and float(further["CapPa"][-1]) > 0, "each by what it is able to"
    costs = {row[0]: row[1:] for row in rows[-7:]}
    samples, share = int(costs["CapPa, wrong"][0]), float(costs["CapPa, wrong"][2])
    one_batch = share * options.study.batch / samples
    assert samples != int(costs["CapPa"][0])
    assert abs(1 - share) <= one_batch / 2 + 0.05, "the nearest number of batches; the table rounds to 0.1"
