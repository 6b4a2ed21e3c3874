"""Recipes: what they parse to, and what their headers promise."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from train_commands import parse

from mug.data.builders.openmoji_compositions import CELL, CELLS
from mug.model.objectives.mug import stage_flops
from mug.run.common.errors import RunError
from mug.run.training.recipe import RECIPES, Recipe, changes, recorded

DEEPSPEED = ["--deepspeed", "ds_configs/zero3.json"]
LARGE = sorted(path for path in (RECIPES / "mug").glob("*.yaml") if not path.stem.endswith("_tiny"))
PAIRS = {"cc3m": 2.82e6, "web200m": 200e6}


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_the_cost_in_a_recipe_is_what_its_model_and_samples_make(path):
    recipe = parse("pretrain", [*DEEPSPEED, "--config", str(path), "--data.shards", "x.tar"]).recipe
    header = " ".join(line.strip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    gflop, samples, hours = map(
        float, re.search(r"Cost: (\S+) GFLOP a sample, (\S+) samples: (\S+) H", header).groups()
    )
    computed = sum(stage_flops(recipe.model, vocabulary_size=30522).values())
    assert computed / 1e9 == pytest.approx(gflop, abs=0.05)
    assert recipe.trainer.epochs * PAIRS[path.stem.partition("_")[0]] == pytest.approx(samples, rel=0.01)
    assert computed * samples / (0.5 * 798e12) / 3600 == pytest.approx(hours, rel=0.01)


@pytest.mark.parametrize(
    "batch, groups, micro, world, fitted",
    [(64, 1, 64, 1, 64), (64, 1, 64, 2, 32), (64, 2, 64, 2, 16), (64, 1, 16, 2, 16), (64, 1, 64, 3, 64)],
    ids=["one rank", "two ranks", "groups", "accumulation", "no share"],
)
def test_a_micro_batch_is_at_most_a_ranks_share_of_a_group(batch, groups, micro, world, fitted):
    sizes = {"global_batch": batch, "groups": groups, "micro_batch": micro}
    command = parse("pretrain", [*DEEPSPEED, *(f"--trainer.{name}={size}" for name, size in sizes.items())])
    assert command.on_ranks(world).recipe.trainer == dataclasses.replace(command.recipe.trainer, micro_batch=fitted)


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_a_large_recipe_never_falls_back_on_the_embedded_pairs(path):
    command = next(line for line in path.read_text().splitlines() if "run/index_shards.py" in line)
    shards = parse("pretrain", [*DEEPSPEED, "--config", str(path)]).recipe.data.shards
    assert shards == command.rpartition(" ")[2] == f"{path.stem.partition('_')[0]}/index"


def test_the_default_recipe_is_used_where_none_is_named():
    command = parse("pretrain", DEEPSPEED)
    assert command.recipe.model.preset == "tiny"
    assert command.recipe.model.image_size == 64
    assert command.output.parts == ("runs", "compositions_tiny")


def test_the_default_recipe_fits_the_pictures_that_it_is_for():
    recipe = parse("pretrain", DEEPSPEED).recipe
    assert recipe.data.embedded == "compositions" and recipe.data.crop_scale == (1.0, 1.0) and not recipe.data.flip
    assert recipe.model.image_size == CELLS * CELL
    assert recipe.model.patch_size == CELL, "things stand on the lines of the patches"
    assert recipe.model.text_length >= len(["BOS", "a", "thing", "left", "of", "an", "other", "EOS"])


@pytest.mark.parametrize(
    ("objective", "option", "line"),
    [
        ("simclr", "crop_scale", "views of simclr: leave it out; set model.view_scale instead"),
        ("simsiam", "crop_scale", "views of simsiam: leave it out; set model.view_scale instead"),
        ("mocov3", "flip", "views of mocov3: leave it out; the objective decides on mirroring"),
        ("slip", "crop_scale", "views of slip: leave it out; set model.view_scale and model.image_scale instead"),
        ("slip", "flip", "views of slip: leave it out"),
    ],
)
def test_crops_that_an_objective_with_views_would_ignore_are_refused(objective, option, line):
    recipe = [*DEEPSPEED, "--config", str(RECIPES / objective / f"openmoji_{objective}.yaml")]
    changed, default = {"crop_scale": ("[0.6, 1.0]", "[0.2, 1.0]"), "flip": ("false", "true")}[option]
    with pytest.raises(RunError, match=re.escape(f"data.{option} does not apply to the {line}")) as refused:
        parse("pretrain", [*recipe, f"--data.{option}", changed])
    assert "\n" not in str(refused.value)
    parse("pretrain", [*recipe, f"--data.{option}", default])


def test_crops_of_a_stream_with_a_name_are_refused_by_it(tmp_path):
    streams = "{a: {weight: 1}, b: {weight: 1, flip: false}}"
    (tmp_path / "two.yaml").write_text(f"objective: simclr\ndata: {streams}\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"^data\.b\.flip does not apply"):
        parse("pretrain", [*DEEPSPEED, "--config", str(tmp_path / "two.yaml")])


def test_a_named_recipe_does_not_inherit_from_the_default(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {preset: base}\n")
    command = parse("pretrain", [*DEEPSPEED, "--config", str(tmp_path / "mine.yaml")])
    assert command.recipe.trainer.max_steps is None
    assert command.recipe.data.flip is True
    assert command.output.name == "mine"


def test_the_command_line_overrides_the_recipe():
    command = parse("pretrain", [*DEEPSPEED, "--trainer.max_steps", "7", "--model.mask_ratio", "0.5", "--local_rank=0"])
    assert command.recipe.trainer.max_steps == 7
    assert command.recipe.model.visible == 32


@pytest.mark.parametrize("config", [["--config", "{}"], ["--config={}"]])
def test_a_flag_overrides_the_recipe_wherever_it_stands(tmp_path, config):
    (tmp_path / "mine.yaml").write_text("model: {preset: base}\ndata: {shards: theirs}\ntrainer: {max_steps: 3}\n")
    config = [part.format(tmp_path / "mine.yaml") for part in config]
    command = parse("pretrain", [*DEEPSPEED, "--data.shards", "mine", *config, "--trainer.max_steps", "7"])
    assert (command.recipe.data.shards, command.recipe.trainer.max_steps) == ("mine", 7)
    assert command.output.name == "mine"


def test_the_learning_rate_scales_with_the_global_batch():
    sizes = ["--trainer.global_batch", "1024", "--trainer.base_learning_rate", "1e-4"]
    assert parse("pretrain", [*DEEPSPEED, *sizes]).recipe.trainer.learning_rate == pytest.approx(4e-4)


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
        parse("pretrain", [*DEEPSPEED, *arguments])
    assert "\n" not in str(caught.value)


def test_deepspeed_json_is_required():
    with pytest.raises(RunError, match="--deepspeed"):
        parse("pretrain", [])


def test_a_recipe_is_read_as_utf_8_whatever_the_locale(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "# Größe\nmodel: {preset: tiny}\ndata: {shards: 'größe/*.tar', tokenizer: t.json}\n", encoding="utf-8"
    )
    script = (
        "import sys; from pathlib import Path; from mug.run.training.recipe import parse_command;"
        "arguments = ['--deepspeed', 'x.json', '--config', sys.argv[1], '--objective', 'mug'];"
        "print(ascii(parse_command('x.py', '', Path('x'), arguments).recipe.data.shards))"
    )
    variables = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", script, recipe], env=variables, capture_output=True, text=True)
    assert done.stdout == "'gr\\xf6\\xdfe/*.tar'\n", done.stderr
    recipe.write_bytes(b"# Gr\xf6\xdfe\n")
    with pytest.raises(RunError, match=r"recipe.yaml is not UTF-8 text .*; save it as UTF-8"):
        parse("pretrain", ["--deepspeed", "x.json", "--config", str(recipe)])


MIXTURE = """
objective: mug
data:
  first:
    weight: 0.6
    crop_scale: [1.0, 1.0]
  second:
    kind: pairs
    weight: 0.3
    shards: other.tar
"""


def test_a_mixture_is_streams_by_name_each_with_the_options_of_its_kind(tmp_path):
    (tmp_path / "mixture.yaml").write_text(MIXTURE)
    options = ["--config", str(tmp_path / "mixture.yaml"), *DEEPSPEED]
    recipe = parse("pretrain", [*options, "--data.second.weight", "0.4", "--data.second.flip", "false"]).recipe
    first, second = recipe.streams["first"], recipe.streams["second"]
    assert (first.kind, first.weight, second.weight) == ("pairs", 0.6, 0.4)
    assert tuple(first.config.crop_scale) == (1.0, 1.0)
    assert not second.config.flip and second.config.shards == "other.tar"
    values = json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert json.loads(json.dumps(dataclasses.asdict(Recipe.from_dict(values)))) == values
    again = parse("pretrain", [*options, "--data.second.weight", "0.4", "--data.second.shards", "moved.tar"]).recipe
    assert [line.split()[0] for line in changes(json.loads(json.dumps(recorded(recipe))), again)] == [
        "data.second.config.flip"
    ]
    with pytest.raises(RunError, match="wieght"):
        parse("pretrain", [*options, "--data.second.wieght", "0.4"])
    (tmp_path / "mixture.yaml").write_text(MIXTURE.replace("kind: pairs", "kind: scenes"))
    with pytest.raises(RunError, match=r"data\.second: mug learns from pairs, not from scenes"):
        parse("pretrain", options)


def test_a_weight_of_0_leaves_a_stream_out(tmp_path):
    (tmp_path / "mixture.yaml").write_text(MIXTURE)
    options = ["--config", str(tmp_path / "mixture.yaml"), *DEEPSPEED, "--data.second.weight", "0"]
    assert [*parse("pretrain", options).recipe.streams] == ["first"]
    with pytest.raises(RunError, match=r"^data: the streams first, second all have weight 0; give one"):
        parse("pretrain", [*options, "--data.first.weight", "0"])
