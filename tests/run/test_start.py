"""Which checkpoint a run resumes from, and which ones it refuses."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from train_commands import parse

from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Context
from mug.model.presets import Vocabulary, resolve
from mug.run.common.errors import RunError
from mug.run.common.output import check_writable, check_writable_file, lock
from mug.run.state import checkpoint
from mug.run.state.restore import describe_model, model_of
from mug.run.training.metrics import logged_losses
from mug.run.training.recipe import Command, count_steps
from mug.run.training.start import find_checkpoint

NAMES = [f"class {number}" for number in range(1000)]
CONTEXT = {"seed": 0, "vocabulary": None, "class_names": NAMES, "losses": []}
DESCRIPTION = {
    "objective": "classify",
    "config": {"preset": "tiny", "depth": 2},
    "context": CONTEXT,
}


def command(output: Path, *options: str) -> Command:
    options = ("--output", str(output), "--trainer.global_batch", "8", *options)
    return parse("pretrain", ["--deepspeed", "x.json", *options])


@pytest.fixture
def saved(tmp_path) -> Path:
    """The folder of a run with one checkpoint."""
    checkpoint.open_partial(tmp_path, 3)
    state = {"model": DESCRIPTION, "recipe": dataclasses.asdict(command(tmp_path).recipe)}
    checkpoint.commit(tmp_path, 3, {}, state, {}, keep=1)
    return tmp_path


def find(saved: Path, *options: str, **sections) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """What is found for a model whose description differs in some sections, and what was warned of."""
    warned: list[str] = []
    description = {name: values for name, values in (DESCRIPTION | sections).items() if values}
    return find_checkpoint(command(saved, *options), description, SimpleNamespace(warn=warned.append)), warned


def test_a_run_resumes_from_its_newest_checkpoint_under_another_name_of_the_preset(saved, tmp_path_factory):
    found, warned = find(saved, config={"preset": "small", "depth": 2})
    assert found.step == 3 and warned == []
    assert find(tmp_path_factory.mktemp("empty")) == (None, [])


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"config": {"preset": "tiny", "depth": 3}}, "config.depth is 2 there, 3 here"),
        (
            {"context": {**CONTEXT, "class_names": [NAMES[0], "b"]}},
            " there, of 2, from number 2 on: b here",
        ),
        ({"objective": "segment"}, "objective is classify there, segment here"),
        ({"config": {"preset": "tiny", "depth": 2, "channels": 8}}, "config.channels is None there, 8 here"),
    ],
)
def test_another_model_is_refused_in_one_short_line(saved, sections, says):
    with pytest.raises(RunError, match="checkpoint-3 is a checkpoint of another model: ") as refused:
        find(saved, **sections)
    assert says in str(refused.value) and len(str(refused.value)) < 300 + len(str(saved))


@pytest.mark.parametrize("losses", [(), ("caption",)])
def test_a_model_is_the_one_that_its_own_manifest_describes(tmp_path, losses):
    sizes = {"depth": 1, "pixel_depth": 1, "text_unimodal_layers": 1, "text_cross_layers": 1}
    model = MUG(resolve(MUGConfig(**sizes)), Context(seed=3, vocabulary=Vocabulary(20, 0, 1, 2, 3), losses=losses))
    checkpoint.open_partial(tmp_path, 3)
    state = {"model": describe_model(model), "recipe": dataclasses.asdict(command(tmp_path).recipe)}
    checkpoint.commit(tmp_path, 3, {}, state, {}, keep=1)
    found = find_checkpoint(command(tmp_path), describe_model(model), SimpleNamespace(warn=pytest.fail))
    again = model_of(found.manifest)
    assert (type(again), again.config, again.context, again.active) == (MUG, model.config, model.context, model.active)


def test_another_recipe_is_refused_unless_it_is_allowed(saved):
    with pytest.raises(RunError, match="global batch 8, this run has 16"):
        find(saved, "--trainer.global_batch", "16", "--allow_changes", "true")
    with pytest.raises(RunError, match=r"was trained with seed 0 \(now 3\); change back"):
        find(saved, "--seed", "3")
    new = {"context": CONTEXT | {"seed": 3, "losses": ["class"]}}
    with pytest.raises(RunError, match=r"was trained with seed 0 \(now 3\); change back"):
        find(saved, "--seed", "3", **new)
    found, warned = find(saved, "--seed", "3", "--allow_changes", "true", **new)
    assert found.step == 3 and warned == [f"{found.folder} was trained with seed 0 (now 3)"]


def test_a_folder_belongs_to_one_run(tmp_path):
    lock(tmp_path / "run")
    with pytest.raises(RunError, match="another run is writing there"):
        lock(tmp_path / "run")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write to .*file; choose another directory"):
        check_writable(tmp_path / "file" / "run")


def test_what_may_not_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "there").touch()
    for name in ("there", "new"):
        check_writable_file(tmp_path / name, "--out")
    assert not (tmp_path / "new").exists()
    for path in (tmp_path, tmp_path / "nowhere" / "new"):
        with pytest.raises(RunError, match=f"--out {path}: cannot write there"):
            check_writable_file(path, "--out")
    monkeypatch.setattr(os, "access", lambda *asked: False)  # nothing stops root
    for name in ("there", "new"):
        with pytest.raises(RunError, match=f"--out {tmp_path}/{name}: cannot write there"):
            check_writable_file(tmp_path / name, "--out")
    with pytest.raises(RunError, match=f"--out {tmp_path}/new: cannot write to {tmp_path}; choose"):
        check_writable(tmp_path / "new", "--out")


def test_the_number_of_steps_is_given_or_follows_from_the_passes():
    trainer = command(Path("x"), "--trainer.max_steps", "null", "--trainer.epochs", "2.5").recipe.trainer
    assert count_steps(trainer, samples=20) == 6
    assert count_steps(dataclasses.replace(trainer, max_steps=4), samples=20) == 4
    with pytest.raises(RunError, match=r"trainer\.epochs 2\.5 x 3 samples is less than one global batch of 8"):
        count_steps(trainer, samples=3)


def test_losses_are_those_of_the_steps_that_still_count(tmp_path):
    assert logged_losses(tmp_path, last=9) == []
    rows = [{"kind": "train", "step": step, "loss/total": loss} for step, loss in ((1, 1.5), (2, None), (3, 0.5))]
    lines = map(json.dumps, [{"kind": "event", "step": 0}, *rows])
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tr')
    assert logged_losses(tmp_path, last=3) == [1.5, 0.5] and logged_losses(tmp_path, last=2) == [1.5]
