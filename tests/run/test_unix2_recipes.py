"""UniX²'s large recipes say what the paper says: section 4.3.1, tables 4 and 5."""

import pytest
from train_commands import parse

from mug.run.training.recipe import RECIPES, Recipe

FILES = {name: RECIPES / "unix2" / f"{name}.yaml" for name in ("base", "base_xlmr")}
READING_B = ["--trainer.global_batch", "16384", "--trainer.groups", "4"]
READING_B += ["--trainer.base_learning_rate", "1.5625e-6", "--trainer.warmup_samples", "65536000"]


def recipe_of(name: str, *options: str) -> Recipe:
    command = ["--deepspeed", "ds_configs/zero3.json", "--config", str(FILES[name]), *options]
    return parse("pretrain", command).recipe


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("options", [[], READING_B])
def test_the_schedule_is_the_papers_in_both_readings_of_a_step(name, options):
    recipe = recipe_of(name, *options)
    trainer = recipe.trainer
    assert (trainer.learning_rate, trainer.min_learning_rate) == (pytest.approx(1e-4), 1e-6)
    assert (trainer.max_steps, trainer.warmup_samples / trainer.global_batch) == (60_000, 4_000)
    assert (trainer.schedule, trainer.weight_decay, trainer.betas) == ("cosine", 0.1, (0.9, 0.999))
    assert trainer.global_batch // trainer.groups == (4096 if options else 512), "the samples that contrast each other"
    assert (trainer.global_batch // trainer.groups) % (32 * trainer.micro_batch) == 0, "on 32 GPUs"
    assert recipe.active_losses == dict.fromkeys(recipe.loss_weights, 1.0) and len(recipe.active_losses) == 9


@pytest.mark.parametrize("name", FILES)
def test_the_kinds_have_equal_shares_and_no_image_is_mirrored(name):
    streams = recipe_of(name).streams.values()
    shares = {kind: sum(one.weight for one in streams if one.kind == kind) for kind in {one.kind for one in streams}}
    assert shares == dict.fromkeys(("pairs", "image_bitext", "bitext", "text"), pytest.approx(0.25))
    assert not any(getattr(one.config, "flip", False) for one in streams)
    lengths = {one.kind: one.config.text_length for one in streams}
    assert lengths == {"pairs": 64, "image_bitext": 64, "bitext": 128, "text": 256}


def test_sizes_and_weights_to_begin_with():
    base, xlmr = (recipe_of(name) for name in FILES)
    assert (base.model.text_model, base.model.text_width, base.model.text_layers) == ("mbart", 1024, 12)
    assert (xlmr.model.text_model, xlmr.model.text_width, xlmr.model.text_layers) == ("xlmr", 768, 6)
    assert xlmr.model.fusion_layers == xlmr.model.text_layers, "the two halves"
    assert all(recipe.init.keys() == {"encoder", "language_model"} for recipe in (base, xlmr))
    sets = {name: base.data[name].weight for name in ("translated", "wit")}
    assert sets["translated"] / sets["wit"] == pytest.approx(75 / 14, rel=0.01), "by their captions, table 6"
