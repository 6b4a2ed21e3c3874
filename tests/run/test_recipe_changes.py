"""What may change in a recipe while its run goes on."""

import dataclasses
import json

import pytest

from mug.run.finetuning.recipe import parse_command as parse_finetuning
from mug.run.training.recipe import FREE, changes, parse_command

ZERO3 = ["--deepspeed", "ds_configs/zero3.json"]


def recipe_of(*options: str):
    return parse_command([*ZERO3, *options]).recipe


def saved(*options: str) -> dict:
    """As a manifest gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(recipe_of(*options))))


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--checkpoint.keep", "7", "--safety.nonfinite", "skip"),
        ("--trainer.max_steps", "9", "--trainer.micro_batch", "8", "--trainer.log_every", "3"),
        ("--data.workers", "5", "--data.cache", "elsewhere"),
    ],
)
def test_how_a_run_is_watched_saved_and_divided_may_change(options):
    assert changes(saved(), recipe_of(*options)) == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--trainer.weight_decay", "0.3"), "trainer.weight_decay 0.05 (now 0.3)"),
        (("--trainer.betas", "[0.9, 0.99]"), "trainer.betas [0.9, 0.95] (now [0.9, 0.99])"),
        (("--loss_weights.caption", "0.5"), "loss_weights.caption 0.1 (now 0.5)"),
        (("--data.flip", "true"), "data.flip False (now True)"),
        (("--seed", "3"), "seed 0 (now 3)"),
    ],
)
def test_what_decides_what_is_learned_is_listed(options, line):
    assert changes(saved(), recipe_of(*options)) == [line]


def test_a_key_that_came_with_a_later_version_is_no_change():
    before = saved()
    del before["trainer"]["weight_decay"]
    assert changes(before, recipe_of("--trainer.weight_decay", "0.3")) == []


def test_what_is_free_exists():
    recipes = [dataclasses.asdict(recipe_of()), dataclasses.asdict(parse_finetuning(ZERO3).recipe)]
    for name in FREE:
        section, _, key = name.partition(".")
        assert any(section in recipe and (not key or key in recipe[section]) for recipe in recipes), name
