"""run/recipe_cost.py: FLOP by kind and loss, and hours of a GPU, from the recipe alone."""

import dataclasses
import re

import pytest
from commands import run_script

from mug.model.multilingual import MultilingualConfig
from mug.model.presets import resolve
from mug.run.common.errors import RunError
from mug.run.recipe_cost import gflop, gflop_by_loss, parse, recipe_of, samples_of
from mug.run.training.recipe import RECIPES

BASE = str(RECIPES / "unix2" / "base.yaml")


@pytest.mark.slow
def test_a_recipes_cost_is_gflop_times_samples_over_the_gpus_rate():
    done = run_script(
        "run/recipe_cost.py", str(RECIPES / "clip" / "cc3m_base.yaml"), "--samples", "1.13e8", "--words", "14"
    )
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()[-2:]
    assert first == "clip (pairs): 113.6 GFLOP a sample; alone: contrastive 113.6"  # as the recipe has it
    hours = 113.6e9 * 1.13e8 / (0.4 * 989e12) / 3600
    assert re.search(rf"{hours:.1f} hours of an H100 at 40% of 989 TFLOP/s$", last)


def test_tasks_of_a_kind_share_their_encoders():
    recipe = dataclasses.replace(recipe_of(BASE), model=resolve(MultilingualConfig("tiny")))
    by_kind = {kind: gflop_by_loss(recipe, kind, 15, 3000) for kind in ("pairs", "text", "bitext", "image_bitext")}
    names = {kind: [*found] for kind, found in by_kind.items()}
    assert names["pairs"] == ["all", "cmcl", "itm", "mlm", "vplm"] and names["text"] == ["all", "mlm", "plm"]
    assert names["bitext"] == ["all", "clcl", "mt"] and names["image_bitext"] == ["all", "mmmt", "mmmt_mlm"]
    for found in by_kind.values():
        alone = [value for name, value in found.items() if name != "all"]
        assert max(alone) < found["all"] < sum(alone)
    assert by_kind["image_bitext"]["mmmt"] > by_kind["bitext"]["mt"]


def test_mistakes():
    with pytest.raises(RunError, match=r"--gpu K80 is not one of A100, "):
        parse([BASE, "--gpu", "K80"])
    with pytest.raises(RunError, match=r"utilization must be more than 0 and at most 1, not 2"):
        parse([BASE, "--utilization", "2"])
    with pytest.raises(RunError, match="the recipe counts epochs of data that are not read here: give --samples"):
        samples_of(recipe_of(str(RECIPES / "clip" / "cc3m_base.yaml")))


@pytest.mark.slow
@pytest.mark.parametrize(("file", "vocabulary"), [("base", 250_027), ("base_xlmr", 250_008)])
def test_the_cost_in_a_recipe_of_unix2_is_what_its_model_and_samples_make(file, vocabulary):
    path = RECIPES / "unix2" / f"{file}.yaml"
    recipe = recipe_of(str(path))
    cost = r"Cost: (\S+) GFLOP a sample with texts of 20 tokens, (\S+) samples: (\S+) H100-hours"
    stated, samples, hours = map(float, re.search(cost, path.read_text()).groups())
    losses = tuple(recipe.active_losses)
    mean = sum(one.weight * gflop(recipe, one.kind, 17, vocabulary, losses)[0] for one in recipe.streams.values())
    assert (mean, samples_of(recipe)) == (pytest.approx(stated, abs=0.05), pytest.approx(samples, rel=0.01))
    assert mean * 1e9 * samples / (0.4 * 989e12) / 3600 == pytest.approx(hours, rel=0.01)
