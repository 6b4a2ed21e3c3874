"""Recipes: what they parse to, and what their headers promise."""

import re

import pytest

from mug.model.flops import flops_per_sample
from mug.run.training.errors import RunError
from mug.run.training.recipe import DEFAULT_RECIPE, RECIPES, parse_command

DEEPSPEED = ["--deepspeed", "ds_configs/zero3.json"]
LARGE = sorted(path for path in RECIPES.glob("*.yaml") if path != DEFAULT_RECIPE)
PAIRS = {"cc3m": 2.82e6, "web200m": 200e6}


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_the_cost_in_a_recipe_is_what_its_model_and_samples_make(path):
    recipe = parse_command([*DEEPSPEED, "--config", str(path), "--data.shards", "x.tar"]).recipe
    header = " ".join(line.strip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    gflop, samples, hours = map(
        float, re.search(r"Cost: (\S+) GFLOP a sample, (\S+) samples: (\S+) H", header).groups()
    )
    computed = sum(flops_per_sample(recipe.model, vocabulary_size=30522).values())
    assert computed / 1e9 == pytest.approx(gflop, abs=0.05)
    assert recipe.trainer.epochs * PAIRS[path.stem.partition("_")[0]] == pytest.approx(samples, rel=0.01)
    assert computed * samples / (0.5 * 798e12) / 3600 == pytest.approx(hours, rel=0.01)


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_a_large_recipe_never_falls_back_on_the_embedded_pairs(path):
    command = next(line for line in path.read_text().splitlines() if "run/index_shards.py" in line)
    shards = parse_command([*DEEPSPEED, "--config", str(path)]).recipe.data.shards
    assert shards == command.rpartition(" ")[2] == f"{path.stem.partition('_')[0]}/index"


def test_the_default_recipe_is_used_where_none_is_named():
    command = parse_command(DEEPSPEED)
    assert command.recipe.model.preset == "tiny"
    assert command.recipe.model.image_size == 64
    assert command.output.parts == ("runs", "openmoji_tiny")


def test_a_named_recipe_does_not_inherit_from_the_default(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {preset: base}\n")
    command = parse_command([*DEEPSPEED, "--config", str(tmp_path / "mine.yaml")])
    assert command.recipe.trainer.max_steps is None
    assert command.recipe.data.flip is True
    assert command.output.name == "mine"


def test_the_command_line_overrides_the_recipe():
    command = parse_command([*DEEPSPEED, "--trainer.max_steps", "7", "--model.mask_ratio", "0.5", "--local_rank=0"])
    assert command.recipe.trainer.max_steps == 7
    assert command.recipe.model.visible == 32


@pytest.mark.parametrize("config", [["--config", "{}"], ["--config={}"]])
def test_a_flag_overrides_the_recipe_wherever_it_stands(tmp_path, config):
    (tmp_path / "mine.yaml").write_text("model: {preset: base}\ndata: {shards: theirs}\ntrainer: {max_steps: 3}\n")
    config = [part.format(tmp_path / "mine.yaml") for part in config]
    command = parse_command([*DEEPSPEED, "--data.shards", "mine", *config, "--trainer.max_steps", "7"])
    assert (command.recipe.data.shards, command.recipe.trainer.max_steps) == ("mine", 7)
    assert command.output.name == "mine"


def test_the_learning_rate_scales_with_the_global_batch():
    sizes = ["--trainer.global_batch", "1024", "--trainer.base_learning_rate", "1e-4"]
    assert parse_command([*DEEPSPEED, *sizes]).recipe.trainer.learning_rate == pytest.approx(4e-4)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--trainer.steps", "3"], "trainer.steps"),
        (["--trainer.max_steps", "three"], "trainer.max_steps"),
        (["--trainer.log_every", "0"], "trainer.log_every"),
        (["--checkpoint.keep", "0"], "checkpoint.keep"),
        (["--trainer.betas", "[2, 0.9]"], "trainer.betas"),
        (["--trainer.warmup_samples", "-1"], "trainer.warmup_samples"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments, names):
    with pytest.raises(RunError, match=re.escape(names)) as caught:
        parse_command([*DEEPSPEED, *arguments])
    assert "\n" not in str(caught.value)


def test_deepspeed_json_is_required():
    with pytest.raises(RunError, match="--deepspeed"):
        parse_command([])
