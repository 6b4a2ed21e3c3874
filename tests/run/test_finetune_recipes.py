"""Recipes of fine-tuning: MAE's numbers, and mistakes named in one line."""

import re

import pytest
from train_commands import recipe_of

from mug.data.augment import AugmentConfig
from mug.run.common.errors import user_errors
from mug.run.state.initial import SIZES
from mug.run.training.recipe import RECIPES

SETS = {"imagenet1k": 1_281_167, "inat2017": 579_184, "inat2018": 437_513, "places365": 1_803_460}


def test_the_default_recipe_takes_the_encoder_of_the_default_pretraining():
    pretrained, finetuned = (recipe_of(command).model for command in ("pretrain", "finetune"))
    for name in (*SIZES, "image_size"):
        assert getattr(finetuned, name) == getattr(pretrained, name), name


@pytest.mark.parametrize("path", sorted((RECIPES / "classify").glob("*_base.yaml")), ids=lambda path: path.stem)
def test_the_large_recipes_are_maes(path):
    recipe = recipe_of("finetune", "--config", str(path), "--data.images", "x")
    trainer, images = recipe.trainer, SETS[path.stem.partition("_")[0]]
    assert trainer.global_batch == 1024 and trainer.learning_rate == pytest.approx(2e-3)
    assert (trainer.layer_decay, trainer.weight_decay, trainer.betas) == (0.65, 0.05, (0.9, 0.999))
    assert trainer.warmup_samples == pytest.approx(5 * images, rel=0.01)
    assert trainer.eval_every == pytest.approx(images / 1024, rel=0.01)
    assert recipe.data.augment == AugmentConfig()
    assert recipe.model.drop_path == 0.1 and recipe.model.pool == "mean" and recipe.model.width == 768


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.drop_path", "1"], "model.drop_path must be at least 0 and less than 1, not 1"),
        (["--data.augment.erase", "-0.5"], "data.augment.erase must be at least 0"),
        (["--trainer.layer_decay", "0"], "trainer.layer_decay must be more than 0"),
        (["--data.crop_scale", "[0.5, 0.2]"], "data.crop_scale"),
        (["--model.pool", "max"], "pool"),
        (["--data.image", "x"], "image"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments, message):
    imagenet = ["--config", str(RECIPES / "classify" / "imagenet1k_base.yaml"), "--data.images", "x"]
    with pytest.raises(user_errors(), match=re.escape(message)) as refused:
        recipe_of("finetune", *imagenet, *arguments)
    assert "\n" not in str(refused.value)
