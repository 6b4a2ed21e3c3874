"""The parts of fine-tuning against timm's, and what their randomness depends on."""

import argparse
import dataclasses
import random
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.optim import param_groups_layer_decay

from mug.data.order import Order
from mug.data.pairs import EvaluationView, TrainView
from mug.model import interchange
from mug.model.classifier import Classifier
from mug.model.encoder import Encoder
from mug.model.positions import sincos_2d, stretched
from mug.model.presets import ModelConfig, resolve
from mug.model.segmenter import Segmenter
from mug.run.evaluation.datasets import open_folder
from mug.run.finetuning.augment import Augment
from mug.run.finetuning.groups import layer_decay_groups
from mug.run.finetuning.images import LabelledImages
from mug.run.finetuning.initial import SIZES, initial_encoder
from mug.run.finetuning.recipe import AugmentConfig, parse_command
from mug.run.training import checkpoint
from mug.run.training.errors import RunError
from mug.run.training.recipe import RECIPES
from mug.run.training.recipe import parse_command as parse_pretraining
from mug.run.training.sharded_state import Piece, write_pieces

CONFIG = resolve(ModelConfig(image_size=16, patch_size=4, width=16, depth=3, heads=2))
PLAIN = AugmentConfig(rand_augment=None, erase=0, mixup=0, cutmix=0, label_smoothing=0)


def test_layer_decay_is_timms():
    model = Classifier(Encoder(CONFIG), CONFIG, 5, "mean", 0.0, seed=0)
    ours = {}
    for group in layer_decay_groups(model, weight_decay=0.05, layer_decay=0.65):
        ours |= {id(p): (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    ours = {name: ours[id(p)] for name, p in model.named_parameters()}
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    vit = timm.create_model("vit_base_patch16_224", num_classes=5, global_pool="avg", **sizes)
    names = {id(p): name for name, p in vit.named_parameters()}
    compared = 0
    for group in param_groups_layer_decay(vit, 0.05, ("pos_embed", "cls_token"), layer_decay=0.65):
        for parameter in group["params"]:
            name = names[id(parameter)]
            mine = name.replace("pos_embed", "positions_ND").replace("fc_norm", "norm")
            mine = mine if mine.startswith(("head", "norm")) else f"encoder.{mine}"
            assert ours.pop(mine) == pytest.approx((group["lr_scale"], group["weight_decay"])), name
            compared += 1
    assert not ours and compared == 3 * 12 + 4 + 4


def views(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 3, 16, 16), dtype=np.uint8))


def test_mixup_mixes_images_and_targets_by_the_same_share():
    augment = Augment(AugmentConfig(rand_augment=None, erase=0, mixup=0.8, cutmix=0, label_smoothing=0.1), 16, 4)
    given, labels = views(4), [0, 1, 2, 3]
    shares = []
    for draw in range(5):
        image, target = augment.batch(given, labels, draw)
        share = (target[0, 0] - 0.025) / 0.9  # smoothing leaves 0.9 + 0.1 / 4 to the true class
        assert torch.allclose(target.sum(1), torch.ones(4))
        assert target[0, 3].item() == pytest.approx(0.9 * (1 - share.item()) + 0.025, abs=1e-6)
        expected = share.item() * given[0].astype(float) + (1 - share.item()) * given[3]
        assert image.dtype == torch.uint8 and np.abs(image[0].numpy() - expected).max() < 0.51
        shares.append(share.item())
    assert len(set(shares)) == 5 and all(0 <= share <= 1 for share in shares)


def test_cutmix_pastes_the_share_that_the_target_says():
    augment = Augment(AugmentConfig(rand_augment=None, erase=0, mixup=0, cutmix=1.0, label_smoothing=0), 16, 4)
    given = views(4)
    for draw in range(5):
        image, target = augment.batch(given, [0, 1, 2, 3], draw)
        own = (image[0].numpy() == given[0]).all(0)
        other = (image[0].numpy() == given[3]).all(0)
        assert (own | other).all()
        assert own.mean() == pytest.approx(target[0, 0].item(), abs=0.02)


def test_without_mixing_images_pass_unchanged():
    image, target = Augment(PLAIN, 16, 3).batch(views(2), [2, 0], draw=1)
    assert np.array_equal(image.numpy(), np.stack(views(2)))
    assert target.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_without_mixing_a_batch_may_be_odd_and_targets_are_smoothed():
    smoothed = dataclasses.replace(PLAIN, label_smoothing=0.3)
    image, target = Augment(smoothed, 16, 3).batch(views(3), [2, 0, 1], draw=1)
    assert np.array_equal(image.numpy(), np.stack(views(3)))
    torch.testing.assert_close(target, torch.tensor([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]))


def test_an_augmented_view_depends_on_its_draw_alone_and_moves_no_other_randomness():
    augment, view = Augment(AugmentConfig(), 16, 3), views(1)[0]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = [augment.view(view, draw) for draw in range(20)]
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    random.seed(4), np.random.seed(4), torch.manual_seed(4)
    again = [augment.view(view, draw) for draw in range(20)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(one.dtype == np.uint8 and one.shape == view.shape for one in first)
    assert len({one.tobytes() for one in first}) > 10, "most draws change it, each in its own way"


def test_random_erasing_replaces_a_rectangle():
    augment = Augment(AugmentConfig(rand_augment=None, erase=0.99, mixup=0, cutmix=0), 16, 3)
    view = np.full((3, 16, 16), 200, np.uint8)
    changed = (augment.view(view, draw=0) != view).any(0)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert 0.02 < changed.mean() < 0.4
    assert len(rows) * len(columns) == pytest.approx(changed.sum(), rel=0.05), "all of a rectangle, and no more"


def images(tmp_path, augment: Augment | None, seed: int = 0) -> LabelledImages:
    from PIL import Image

    for number in range(12):
        path = tmp_path / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    source = open_folder(tmp_path)
    names = sorted(set(source.labels))
    labels = np.array([names.index(label) for label in source.labels])
    view = TrainView(Order(np.array([12]), seed), (0.5, 1.0), True) if augment else EvaluationView(np.array([12]))
    return LabelledImages(source, labels, names, 16, "exact", view, augment)


def test_an_epoch_shows_every_image_once_with_its_label_and_the_next_one_otherwise(tmp_path):
    train = images(tmp_path, Augment(PLAIN, 16, 3))
    epochs = [train.batch(range(12 * epoch, 12 * epoch + 12))[0] for epoch in (0, 1)]
    for epoch in epochs:
        assert epoch["target"].sum(0).tolist() == [4, 4, 4]
        assert len({image.numpy().tobytes() for image in epoch["image"]}) == 12
    assert not torch.equal(epochs[0]["target"], epochs[1]["target"])
    split = torch.cat([train.batch(range(12, 18))[0]["image"], train.batch(range(18, 24))[0]["image"]])
    assert torch.equal(split, epochs[1]["image"])


class Recorder(Augment):
    """Notes the draws that it is given."""

    def __init__(self):
        super().__init__(PLAIN, 16, 3)
        self.views, self.batches = [], []

    def view(self, view_CSS, draw):
        self.views.append(draw)
        return super().view(view_CSS, draw)

    def batch(self, views, labels, draw):
        self.batches.append(draw)
        return super().batch(views, labels, draw)


def test_every_position_has_its_own_draw_however_batches_are_cut(tmp_path):
    whole, halves, other = Recorder(), Recorder(), Recorder()
    images(tmp_path, whole).batch(range(24))
    for start in (0, 12):
        images(tmp_path, halves).batch(range(start, start + 12))
    images(tmp_path, other, seed=1).batch(range(24))
    assert whole.views == halves.views and len(set(whole.views)) == 24
    assert not set(whole.views) & set(other.views)
    assert len({*whole.batches, *halves.batches}) == 2, "a batch's draw is that of its first position"
    assert not {*whole.batches} & {*whole.views, *other.batches}


def test_test_images_keep_their_order_and_are_not_changed(tmp_path):
    test = images(tmp_path, None)
    batch, replaced = test.batch(range(12))
    assert batch["target"].argmax(1).tolist() == test.labels_N.tolist() and replaced == []
    assert np.array_equal(batch["image"][3].numpy(), test.source.view(3, 16))


# --- Weights to begin with --------------------------------------------------------------------------------


def test_weights_of_a_real_timm_vit_are_taken_with_its_positions(tmp_path):
    vit = timm.create_model(
        "vit_base_patch16_224", num_classes=9, img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2
    ).eval()
    torch.nn.init.normal_(vit.pos_embed)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    torch.save({"model": vit.state_dict()}, tmp_path / "mae.pth")
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = vit.forward_features((image / 255 - mean) / std)
    for name in ("vit.safetensors", "mae.pth"):
        encoder = initial_encoder(CONFIG, str(tmp_path / name), 0, pytest.fail)
        assert (encoder(image) - expected).abs().max() < 1e-4
        model = Classifier(encoder, CONFIG, 3, "cls", 0.0, 0)
        assert torch.equal(model.encoder.positions_ND, vit.pos_embed[0, 1:]), "and are trained from there"


LARGER = resolve(dataclasses.replace(CONFIG, image_size=32))


def test_positions_of_a_files_smaller_images_are_stretched(tmp_path):
    small, large = (dataclasses.replace(config, depth=4) for config in (CONFIG, LARGER))
    given = interchange.to_timm(Encoder(small))
    given["pos_embed"] = torch.randn(1, 17, 16)
    save_file(given, tmp_path / "learned.safetensors")
    encoder = initial_encoder(large, str(tmp_path / "learned.safetensors"), 0, pytest.fail)
    expected = resample_abs_pos_embed(given["pos_embed"], [8, 8], [4, 4], num_prefix_tokens=1, antialias=False)
    torch.testing.assert_close(encoder.positions_ND, expected[0, 1:])
    torch.testing.assert_close(encoder.cls_token, given["cls_token"] + given["pos_embed"][:, :1])
    assert torch.equal(encoder.blocks[2].mlp.fc2.weight, given["blocks.2.mlp.fc2.weight"])
    model = Segmenter(encoder, large, 3, 8, 0.0, 0)
    torch.testing.assert_close(model.encoder.positions_ND, expected[0, 1:])


def saved(output: Path, model: torch.nn.Module, **described: dict) -> str:
    """A checkpoint of the model, as one rank writes it."""
    partial = checkpoint.open_partial(output, 1)
    pieces = {Piece(name, 0): value.detach().flatten() for name, value in model.named_parameters()}
    seal, _ = write_pieces(partial / "weight-0.safetensors", pieces)
    manifest = {"model": {"config": dataclasses.asdict(CONFIG), **described}}
    checkpoint.commit(output, 1, {"weight-0.safetensors": seal}, manifest, {}, keep=1)
    return str(output)


def test_positions_of_a_pretraining_run_are_stretched_too(tmp_path):
    run = saved(tmp_path / "run", torch.nn.ModuleDict({"encoder": Encoder(CONFIG)}))
    same = initial_encoder(CONFIG, run, 0, pytest.fail)
    assert torch.equal(same.positions_ND, sincos_2d(16, 4))
    larger = initial_encoder(LARGER, run, 0, pytest.fail)
    torch.testing.assert_close(larger.positions_ND, stretched(sincos_2d(16, 4), 8))
    assert torch.equal(larger.cls_token, same.cls_token)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_finetuned_encoder_is_taken_with_its_trained_positions_and_norm(tmp_path, pool):
    tuned = Classifier(Encoder(CONFIG), CONFIG, 5, pool, 0.1, seed=0).eval()
    for parameter in tuned.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    run = saved(tmp_path / "run", tuned, classifier={"pool": pool, "names": []})
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = tuned.norm(tuned.encoder(image))
    encoder = initial_encoder(CONFIG, run, 1, pytest.fail)
    torch.testing.assert_close(encoder(image), expected)
    again = Classifier(encoder, CONFIG, 3, "mean", 0.0, 0)
    assert torch.equal(again.encoder.positions_ND, tuned.encoder.positions_ND)
    larger = initial_encoder(LARGER, run, 1, pytest.fail)
    torch.testing.assert_close(larger.positions_ND, stretched(tuned.encoder.positions_ND.detach(), 8))


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path):
    wide = resolve(ModelConfig(image_size=16, patch_size=4, width=32, depth=3, heads=2))
    save_file(interchange.to_timm(Encoder(wide)), tmp_path / "wide.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "broken.pth").write_bytes(b"x" * 100)
    (tmp_path / "empty.pth").touch()
    torch.save({"model": {}, "args": argparse.Namespace()}, tmp_path / "objects.pth")
    cases = {
        "wide.safetensors": "are of another size: cls_token is (1, 1, 32), our encoder's is (1, 1, 16)",
        "broken.safetensors": "no weights that can be read",
        "broken.pth": "no weights that can be read",
        "empty.pth": "no weights that can be read (it is empty)",
        "objects.pth": "it is damaged, or holds more than tensors; save them alone",
        "nowhere": "no such file or folder",
        ".": "holds no checkpoint",
    }
    for name, message in cases.items():
        with pytest.raises(RunError, match=re.escape(message)) as refused:
            initial_encoder(CONFIG, str(tmp_path / name), 0, pytest.fail)
        assert "\n" not in str(refused.value)


# --- Recipes ----------------------------------------------------------------------------------------------

DEEPSPEED = ["--deepspeed", "ds_configs/zero1.json"]
SETS = {"imagenet1k": 1_281_167, "inat2017": 579_184, "inat2018": 437_513, "places365": 1_803_460}


def test_the_default_recipe_takes_the_encoder_of_the_default_pretraining():
    pretrained, finetuned = (parse(DEEPSPEED).recipe.model for parse in (parse_pretraining, parse_command))
    for name in (*SIZES, "image_size"):
        assert getattr(finetuned.encoder, name) == getattr(pretrained, name), name


@pytest.mark.parametrize("path", sorted((RECIPES / "finetune").glob("*_base.yaml")), ids=lambda path: path.stem)
def test_the_large_recipes_are_maes(path):
    recipe = parse_command([*DEEPSPEED, "--config", str(path), "--data.images", "x"]).recipe
    trainer, images = recipe.trainer, SETS[path.stem.partition("_")[0]]
    assert trainer.global_batch == 1024 and trainer.learning_rate == pytest.approx(2e-3)
    assert (trainer.layer_decay, trainer.weight_decay, trainer.betas) == (0.65, 0.05, (0.9, 0.999))
    assert trainer.warmup_samples == pytest.approx(5 * images, rel=0.01)
    assert trainer.eval_every == pytest.approx(images / 1024, rel=0.01)
    assert recipe.augment == AugmentConfig()
    assert recipe.model.drop_path == 0.1 and recipe.model.pool == "mean" and recipe.model.encoder.width == 768


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.micro_batch", "3"], "micro_batch is 3: mixing pairs images"),
        (["--model.drop_path", "1"], "model.drop_path must be less than 1"),
        (["--augment.erase", "-0.5"], "augment.erase must be at least 0"),
        (["--trainer.layer_decay", "0"], "trainer.layer_decay must be more than 0"),
        (["--data.crop_scale", "[0.5, 0.2]"], "data.crop_scale"),
        (["--model.pool", "max"], "pool"),
        (["--data.image", "x"], "image"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments, message):
    imagenet = ["--config", str(RECIPES / "finetune" / "imagenet1k_base.yaml"), "--data.images", "x"]
    with pytest.raises(RunError, match=re.escape(message)) as refused:
        parse_command([*DEEPSPEED, *imagenet, *arguments])
    assert "\n" not in str(refused.value)


def test_a_policy_that_timm_does_not_know_is_named():
    with pytest.raises(RunError, match=r"augment.rand_augment auto is no policy"):
        Augment(AugmentConfig(rand_augment="auto"), 16, 3)
