"""The comparison of losses: its commands are ones that the scripts take, and its table holds what they found."""

import dataclasses
import errno
import json
import re

import pytest

from mug.run import experiments, knn, linear_probe
from mug.run.evaluation.results import spread, table, write_section
from mug.run.experiments import (
    OBJECTIVES,
    Part,
    report,
    run_of,
    run_part,
    run_side_by_side,
    stages,
    studies,
    time_taken,
)
from mug.run.finetuning.recipe import parse_command as parse_finetune
from mug.run.training.errors import RunError
from mug.run.training.recipe import parse_command as parse_pretrain

PARSERS = {
    "pretrain.py": parse_pretrain,
    "finetune.py": parse_finetune,
    "knn.py": knn.parse,
    "linear_probe.py": linear_probe.parse,
}


class Silent:
    def __init__(self):
        self.said = []

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture
def options(tmp_path):
    def made(*arguments: str):
        return experiments.parse([*arguments, "--fashion_mnist", str(tmp_path), "--openclipart", str(tmp_path)])

    return made


@pytest.mark.parametrize("form", [[], ["--quick"]], ids=["full", "quick"])
def test_every_command_is_one_that_its_script_takes(options, form, tmp_path):
    (tmp_path / "found").mkdir()
    for study in studies(options(*form)):
        pretrained = {}
        for part in [part for chains in stages(study, tmp_path) for chain in chains for part in chain]:
            script, *arguments = part.command
            if script in PARSERS:
                parsed = PARSERS[script](arguments)
            if script == "pretrain.py":
                recipe, name = parsed.recipe, str(parsed.output.name)
                pretrained[name] = (recipe.seed, recipe.trainer.max_steps * recipe.trainer.global_batch)
                weights = recipe.loss_weights["pixels"], recipe.loss_weights["caption"]
                assert weights == OBJECTIVES[name.replace("_", " ").rpartition(" ")[0]]
        assert len(pretrained) == 3 * study.seeds
        assert {samples for _, samples in pretrained.values()} == {study.samples // 64 * 64}


def test_the_full_form_has_three_seeds_and_both_data_sets(options):
    assert [(study.kind, study.seeds) for study in studies(options())] == [("fashion-mnist", 3), ("openclipart", 1)]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A command that adds a line to what it produces, and fails while there is a file `broken`."""
    source = "import pathlib, sys\nout = pathlib.Path(sys.argv[1])\n"
    source += "text = out.read_text() if out.exists() else ''\nout.write_text(text + 'x')\n"
    source += f"if pathlib.Path({str(tmp_path / 'broken')!r}).exists(): sys.exit('error: out of luck')\n"
    (tmp_path / "script.py").write_text(source)
    monkeypatch.setattr(experiments, "RUN", tmp_path)
    produced = tmp_path / "produced.txt"
    return lambda *more: Part("a part", ["script.py", str(produced), *more], produced)


def test_a_finished_part_is_not_run_again_unless_its_command_changed(tmp_path, script):
    console = Silent()
    for part, times in ((script(), 1), (script(), 1), (script("other"), 2)):
        run_part(part, tmp_path, console)
        assert len(console.said) == times
        assert (tmp_path / "produced.txt").read_text() == "x", "never added to what was there"


def test_a_part_that_fails_is_named_with_its_log_and_run_anew(tmp_path, script):
    (tmp_path / "broken").touch()
    with pytest.raises(RunError, match=r"a part ended with status 1: error: out of luck \(all of it: .*a part.log\)"):
        run_part(script(), tmp_path, Silent())
    (tmp_path / "broken").unlink()
    run_part(script(), tmp_path, Silent())
    assert (tmp_path / "produced.txt").read_text() == "x"


def test_chains_run_side_by_side_and_their_parts_in_order(tmp_path, monkeypatch):
    (tmp_path / "meet.py").write_text(
        "import pathlib, sys, time\nmine, other = map(pathlib.Path, sys.argv[1:])\nmine.touch()\n"
        "until = time.time() + 60\nwhile not other.exists() and time.time() < until: time.sleep(0.01)\n"
        "sys.exit(0 if other.exists() else 'error: alone')\n"
    )
    monkeypatch.setattr(experiments, "RUN", tmp_path)
    monkeypatch.setattr(experiments, "at_once", lambda: 2)
    one, two, last = tmp_path / "one", tmp_path / "two", tmp_path / "last"
    chains = [
        [Part("a", ["meet.py", str(one), str(two)]), Part("b", ["meet.py", str(last), str(last)])],
        [Part("c", ["meet.py", str(two), str(one)])],  # ends only while `a` runs
    ]
    console = Silent()
    run_side_by_side(chains, tmp_path, console)
    names = [line.split(": ")[1].split(",")[0] for line in console.said]
    assert sorted(names) == ["a", "b", "c"] and names.index("a") < names.index("b")


def test_after_a_failure_no_further_part_begins(tmp_path, script, monkeypatch):
    monkeypatch.setattr(experiments, "at_once", lambda: 1)
    (tmp_path / "broken").touch()
    first, second, third = (dataclasses.replace(script(), name=name) for name in ("one", "two", "three"))
    with pytest.raises(RunError, match="one ended with status 1"):
        run_side_by_side([[first, second], [third]], tmp_path, Silent())
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["one.log"]


def test_a_full_disk_ends_the_other_chains_too(tmp_path, monkeypatch):
    begun = []

    def run_part(part: Part, *_) -> None:
        begun.append(part.name)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(experiments, "at_once", lambda: 1)
    monkeypatch.setattr(experiments, "run_part", run_part)
    with pytest.raises(OSError, match="No space left"):
        run_side_by_side([[Part("one", [])], [Part("two", [])]], tmp_path, Silent())
    assert begun == ["one"]


def test_time_counts_once_and_not_in_pauses():
    spans = [(10, 20), (0, 4), (12, 15), (18, 25), (30, 31)]
    assert time_taken([{"began": began, "ended": ended} for began, ended in spans]) == 4 + 15 + 1


def test_the_table_holds_means_and_deviations_of_what_was_found(options, tmp_path):
    study = studies(options())[0]
    (tmp_path / "found").mkdir()

    def found(name: str, *values: float, features=("mean of patches", "class token")) -> None:
        for script, setting in (("linear_probe", ""), ("knn", "k = 20"), ("knn", "k = 10")):
            rows = [{"feature": one, "setting": setting, "values": list(values)} for one in features]
            with (tmp_path / "found" / f"{name} {script}.jsonl").open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def tuned(name: str, accuracy: float) -> None:
        folder = tmp_path / f"finetune {name}".replace(" ", "_")
        folder.mkdir()
        row = {"kind": "eval", "step": 1, "accuracy/class": accuracy}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    for i, objective in enumerate(OBJECTIVES):
        for seed, accuracy in enumerate((0.70, 0.72, 0.74)):
            found(f"{objective} {seed}", accuracy + i / 10)
            run_of(tmp_path, objective, seed).mkdir()
            row = {"kind": "train", "step": 1, "images_per_s": 100 + seed}
            (run_of(tmp_path, objective, seed) / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        tuned(objective, 0.9)
    found("untrained", 0.5, 0.6, 0.7)
    tuned("untrained", 0.85)
    found("raw pixels", 0.4, features=("pixels",))
    lines = report(study, tmp_path).splitlines()
    assert lines[-5] == "| MUG | 72.00 ± 2.00 | 72.00 ± 2.00 | 72.00 ± 2.00 | 90.00 | 101 |"
    assert lines[-3].startswith("| captions alone | 92.00 ± 2.00 |")
    assert lines[-2] == "| untrained | 60.00 ± 10.00 | 60.00 ± 10.00 | 60.00 ± 10.00 | 85.00 |  |"
    assert lines[-1] == "| raw pixels | 40.00 |  | 40.00 |  |  |"


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


def test_folders_that_are_not_there_are_named(tmp_path):
    with pytest.raises(RunError, match=re.escape(f"--openclipart {tmp_path}/no: no such folder")):
        experiments.parse(["--fashion_mnist", str(tmp_path), "--openclipart", f"{tmp_path}/no"])
    with pytest.raises(RunError, match="--quik"):
        experiments.parse(["--quik"])
