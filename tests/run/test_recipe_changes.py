"""What may change in a recipe when its run resumes."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
from train_commands import DEEPSPEED, parse, recipe_of

from mug.run.common.errors import RunError
from mug.run.state import checkpoint
from mug.run.training.loop import warn_of_jump
from mug.run.training.recipe import MUTABLE_ON_RESUME, Command, Recipe, changes
from mug.run.training.schedule import CosineSchedule, LinearSchedule, jump
from mug.run.training.start import find_checkpoint

MODEL = {"objective": "segment", "config": {"channels": 8}, "context": {"class_names": ["a", "b"]}}


def as_saved(recipe: Recipe) -> dict:
    """As a manifest gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def saved(*options: str) -> dict:
    return as_saved(recipe_of("pretrain", *options))


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--checkpoint.keep", "7", "--faults.nonfinite", "skip"),
        ("--trainer.max_steps", "9", "--trainer.micro_batch", "8", "--trainer.log_every", "3"),
        ("--data.workers", "5", "--data.cache", "elsewhere"),
    ],
)
def test_how_a_run_is_watched_saved_and_divided_may_change(options):
    assert changes(saved(), recipe_of("pretrain", *options)) == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--trainer.weight_decay", "0.3"), "trainer.weight_decay 0.05 (now 0.3)"),
        (("--trainer.betas", "[0.9, 0.99]"), "trainer.betas [0.9, 0.95] (now [0.9, 0.99])"),
        (("--loss_weights.caption", "0.5"), "loss_weights.caption 1.0 (now 0.5)"),
        (("--data.flip", "true"), "data.flip False (now True)"),
        (("--seed", "3"), "seed 0 (now 3)"),
    ],
)
def test_what_decides_what_is_learned_is_listed(options, line):
    assert changes(saved(), recipe_of("pretrain", *options)) == [line]


def test_a_key_that_came_with_a_later_version_is_no_change():
    before = saved()
    del before["trainer"]["weight_decay"]
    assert changes(before, recipe_of("pretrain", "--trainer.weight_decay", "0.3")) == []


def test_what_is_free_exists():
    answer = "finetune", "--config", "run/recipes/answer/statements_tiny.yaml"
    commands = ("pretrain",), ("finetune",), ("segment",), answer
    recipes = [dataclasses.asdict(recipe_of(*command)) for command in commands]
    for name in MUTABLE_ON_RESUME:
        section, _, key = name.partition(".")
        assert any(section in recipe and (not key or key in recipe[section]) for recipe in recipes), name


def segmentation_run(tmp_path, *options: str) -> Command:
    """A run's folder with a checkpoint of step 3, and the command that is to resume it."""
    command = parse("segment", [*DEEPSPEED, "--output", str(tmp_path), "--trainer.max_steps", "3", *options])
    if not checkpoint.list_folders(tmp_path):
        checkpoint.open_partial(tmp_path, 3)
        checkpoint.commit(tmp_path, 3, {}, {"model": MODEL, "recipe": as_saved(command.recipe)}, {}, keep=1)
    return command


def test_segmentation_takes_no_other_learning_rate_on_resume_without_a_word(tmp_path):
    segmentation_run(tmp_path)
    warned = []
    console = SimpleNamespace(warn=warned.append)
    free = ("--data.workers", "0", "--data.folder", "elsewhere", "--checkpoint.keep", "5", "--trainer.max_steps", "9")
    assert find_checkpoint(segmentation_run(tmp_path, *free), MODEL, console).step == 3 and warned == []
    changed = ("--trainer.base_learning_rate", "0.01")
    line = "trainer.base_learning_rate 0.064 (now 0.01)"
    with pytest.raises(RunError, match=rf"was trained with {re.escape(line)}; change back"):
        find_checkpoint(segmentation_run(tmp_path, *changed), MODEL, console)
    allowed = segmentation_run(tmp_path, *changed, "--allow_changes", "true")
    assert find_checkpoint(allowed, MODEL, console).step == 3
    assert len(warned) == 1 and line in warned[0]


# --- The learning rate of more steps ------------------------------------------------------------------------


def test_more_steps_on_a_finished_run_make_the_learning_rate_jump():
    before, now = (CosineSchedule(peak=8e-4, minimum=0.0, warmup=0, total=8 * steps) for steps in (20, 40))
    assert jump(before, now, 20, 8) == "the learning rate jumps from 1.2e-06 at step 20 to 3.8e-04 at step 21"
    assert now(20.5 * 8) == pytest.approx(3.8e-4, rel=0.02)


def test_a_schedule_that_is_kept_is_no_jump_however_steep():
    schedule = LinearSchedule(peak=1e-3, minimum=0.0, warmup=80, total=160)
    assert all(jump(schedule, schedule, step, 8) is None for step in range(1, 20))
    longer = LinearSchedule(peak=1e-3, minimum=0.0, warmup=80, total=162)
    assert jump(schedule, longer, 11, 8) is None, "within 5%"


def test_a_run_that_resumes_with_more_steps_names_the_jump(tmp_path):
    before, now = (
        recipe_of("segment", "--trainer.warmup_samples", "0", "--trainer.max_steps", steps) for steps in ("20", "40")
    )
    finished = checkpoint.Checkpoint(tmp_path, {"step": 20, "recipe": as_saved(before)})
    warned = []
    for recipe, steps in ((before, 20), (now, 40)):
        console, stream = SimpleNamespace(warn=warned.append), SimpleNamespace(samples=100)
        warn_of_jump(SimpleNamespace(recipe=recipe, steps=steps, stream=stream, console=console), finished)
    line = "the learning rate jumps from 5.0e-05 at step 20 to 9.7e-04 at step 21"
    assert warned == [f"{line} (the run had 20 steps, and now has 40)"]
