"""Kinds of samples: one protocol, found by their names, on no other layer."""

import ast
import copy
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import encode
from PIL import Image

from mug.data import pixels
from mug.data.augment import AugmentConfig
from mug.data.builders.writers import write_tar
from mug.data.config import DataConfig
from mug.data.crops import ViewConfig
from mug.data.errors import DataError
from mug.data.kinds import labelled, pairs, scenes
from mug.data.kinds.samples import Batch, Samples, Shape, find_kind, kind_names
from mug.data.loader import load
from mug.data.order import Order
from mug.model import encoder
from mug.model.objectives import segment

ROOT = Path(__file__).parents[2]


def test_data_imports_neither_run_nor_model():
    imported = {
        (path.name, node.module)
        for path in (ROOT / "data").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    }
    assert len(imported) > 100
    assert [one for one in imported if one[1].startswith(("mug.run", "mug.model", "mug.kernels"))] == []


def test_what_data_and_model_both_know_is_the_same():
    assert (pixels.PIXEL_MEAN, pixels.PIXEL_STD) == (encoder.PIXEL_MEAN, encoder.PIXEL_STD)
    assert scenes.IGNORED == segment.IGNORED


def test_kinds_are_found_by_their_names():
    assert {"pairs", "labelled", "scenes"} <= set(kind_names()) and "samples" not in kind_names()
    for name in kind_names():
        module = find_kind(name)
        assert module.__name__ == f"mug.data.kinds.{name}"
        assert callable(module.open_train) and callable(module.open_held_out) and module.Config()
    with pytest.raises(
        DataError, match=r"'pair' is not a kind of data: give one of .*labelled, pairs, questions, scenes"
    ):
        find_kind("pair")


class Numbers:
    def batch(self, positions):
        return Batch("numbers", {"position": torch.tensor(positions)}), []


def test_a_batch_keeps_its_kind_on_its_way():
    for start, (batch, _) in enumerate(load(Numbers(), iter([[0, 1], [1, 2]]), workers=0)):
        assert isinstance(batch, Batch) and batch.kind == "numbers" and batch["position"].tolist() == [start, start + 1]
    copied = pickle.loads(pickle.dumps(batch))
    assert copied.kind == "numbers" and torch.equal(copied["position"], batch["position"])
    assert copy.copy(batch).kind == "numbers" and copy.copy(batch) == batch


@pytest.fixture
def folder(tmp_path) -> Path:
    """Labelled images: 6 to train on, 4 to test on; each of one colour, 40 x number + 10."""
    for split, count in (("train", 6), ("test", 4)):
        for number in range(count):
            path = tmp_path / "images" / split / ("cat", "dog")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 10), (40 * number + 10,) * 3).save(path)
    return tmp_path / "images"


def test_labelled_images_by_position(folder):
    plain = AugmentConfig(None, 0, 0, 0, label_smoothing=0.5)
    config = labelled.LabelledConfig(images=str(folder), workers=0, augment=plain)
    train = labelled.open_train(config, 3, Shape(8))
    test = labelled.open_held_out(config, Shape(8))
    assert isinstance(train, Samples) and isinstance(test, Samples)
    assert (len(train), len(test), train.kind, train.class_names) == (6, 4, "labelled", ("cat", "dog"))
    assert isinstance(train.order, Order) and train.order.seed == 3 and test.order is None
    assert train.tokenizer is None and train.files() == {}
    batch, replaced = test.batch([2, 1])
    # by class, then by name: cat/0, cat/2, dog/1, dog/3
    assert batch["image"][:, 0, 0, 0].tolist() == [50, 90] and batch["target"].argmax(1).tolist() == [1, 0]
    assert (batch.kind, replaced) == ("labelled", [])
    epoch, _ = train.batch(range(6))
    assert sorted(epoch["image"][:, 0, 0, 0].tolist()) == [10, 50, 90, 130, 170, 210]
    assert epoch["target"].sort(1).values.tolist() == [[0.25, 0.75]] * 6


def test_labelled_images_must_be_named_and_have_one_view(folder):
    with pytest.raises(DataError, match=r"data\.images is missing"):
        labelled.open_train(labelled.LabelledConfig(), 0, Shape(8))
    config = labelled.LabelledConfig(images=str(folder))
    with pytest.raises(DataError, match="labelled images are read in one view"):
        labelled.open_held_out(config, Shape(8, views=(ViewConfig(),) * 2))


def test_central_squares_of_all_images(folder):
    squares = labelled.CentralSquares(labelled.splits_of(labelled.LabelledConfig(images=str(folder))).test, 8)
    assert isinstance(squares, Samples) and len(squares) == 4
    batch, _ = squares.batch(range(4))
    assert batch["image"].shape == (4, 3, 8, 8) and batch["image"][:, 0, 0, 0].tolist() == [10, 90, 50, 130]
    assert batch["position"].tolist() == [0, 1, 2, 3] and "target" not in batch


def test_scenes_by_position(tmp_path):
    for split in ("training", "validation"):
        for part in ("images", "annotations"):
            (tmp_path / part / split).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 16), (50 * number,) * 3).save(tmp_path / "images" / split / f"{number}.png")
            label = Image.fromarray(np.full((16, 20), number, np.uint8))
            label.save(tmp_path / "annotations" / split / f"{number}.png")
    config = scenes.SceneConfig(folder=str(tmp_path), classes=3, distort=False, scale=(1.0, 1.0))
    train, whole = scenes.open_train(config, 0, Shape(16)), scenes.open_held_out(config, Shape(16))
    assert isinstance(train, Samples) and isinstance(whole, Samples)
    assert (len(train), len(whole), train.kind, whole.order) == (3, 3, "scenes", None)
    assert train.class_names == whole.class_names == ("0", "1", "2")
    batch, _ = train.batch(range(3))
    assert batch.kind == "scenes" and batch["image"].shape == (3, 3, 16, 16)
    assert (batch["image"][:, 0] == 50 * batch["labels"]).all() and batch["labels"].unique().tolist() == [0, 1, 2]
    one, _ = whole.batch([2])
    assert one["image"].shape == (1, 3, 16, 20) and (one["labels"] == 2).all()
    with pytest.raises(DataError, match="class 2 is out of range"):
        scenes.open_train(replace(config, classes=2), 0, Shape(16)).batch(range(3))
    with pytest.raises(DataError, match="scenes are read in one view"):
        scenes.open_held_out(config, Shape(16, views=(ViewConfig(),)))


# --- Views of pairs ---------------------------------------------------------------------------------------


VIEWS = (ViewConfig(), ViewConfig((0.05, 0.1), flip=False), ViewConfig())


@pytest.fixture
def config(tmp_path, make_shards, tokenizer_file) -> DataConfig:
    make_shards(tmp_path / "shards", [12, 9, 16])
    shards = f"{tmp_path}/shards/*.tar"
    options = {"tokenizer": str(tokenizer_file), "cache": str(tmp_path / "cache"), "workers": 0}
    return DataConfig(shards=shards, held_out=shards, **options)


def test_pairs_in_several_views(config):
    plain, several = (pairs.open_train(config, 5, Shape(16, 8, views)) for views in ((), VIEWS))
    assert isinstance(several, Samples) and several.files().keys() == {"tokenizer.json"}
    one, _ = plain.batch(range(40))
    batch, replaced = several.batch(range(40))
    assert set(batch) == {"views", "tokens", "position"} and not replaced
    assert batch["views"].dtype == torch.uint8 and batch["views"].shape == (40, 3, 3, 16, 16)
    assert torch.equal(batch["tokens"], one["tokens"]) and batch["position"].tolist() == list(range(40))
    assert torch.equal(batch["views"][:, 0], one["image"]), "the first is what a single crop is"
    assert not any(torch.equal(a, b) for a, b in zip(batch["views"][:, 0], batch["views"][:, 2], strict=True))
    again, _ = several.batch([17, 3])
    assert torch.equal(again["views"], batch["views"][[17, 3]]), "of no other sample of the batch"
    two, _ = pairs.open_train(config, 5, Shape(16, 8, VIEWS[:2])).batch(range(40))
    assert torch.equal(two["views"], batch["views"][:, :2]), "of no other view"


def test_pairs_for_a_model_without_text(config):
    with_text, without = pairs.open_train(config, 5, Shape(16, 8)), pairs.open_train(config, 5, Shape(16))
    assert without.tokenizer is None and without.files() == {} and set(without.identity()) == {"fingerprint"}
    batch, _ = without.batch(range(20))
    assert set(batch) == {"image", "position"}
    assert torch.equal(batch["image"], with_text.batch(range(20))[0]["image"])


def test_views_have_their_own_scale_and_flip(config, tmp_path):
    """On a picture whose colours tell the place: left to right in red, top to bottom in green."""
    x = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    write_tar(tmp_path / "ramp.tar", [("a.png", encode(np.stack([x, x.T, x * 0], 2))), ("a.txt", b"picture")])
    config.shards = f"{tmp_path}/ramp.tar"
    batch, _ = pairs.open_train(config, 0, Shape(16, 8, VIEWS)).batch(range(200))
    red = batch["views"][:, :, 0].float().mean(2)  # [200, 3, 16], along the width
    flipped = (red[..., -1] < red[..., 0]).float().mean(0)
    assert flipped[1] == 0 and all(0.4 < flipped[v] < 0.6 for v in (0, 2))
    width = (red[..., -1] - red[..., 0]).abs() * 16 / 15
    height = batch["views"][:, :, 1].float().mean(3).diff(dim=-1).mean(-1) * 16
    share = width * height / 256**2
    assert share[:, 1].min() > 0.04 and share[:, 1].max() < 0.12
    assert share[:, 0].min() < 0.3 and share[:, 0].max() > 0.9
    signs = torch.sign(red[..., -1] - red[..., 0])
    assert abs((signs[:, 0] * signs[:, 2]).mean()) < 0.25, "views flip by their own draws"


def test_held_out_views_are_random_crops_and_the_same_each_time(config):
    held_out = pairs.open_held_out(config, Shape(16, 8, VIEWS[::2]))
    assert held_out.order is None
    batch, _ = held_out.batch(range(10))
    again, _ = pairs.open_held_out(config, Shape(16, 8, VIEWS[::2])).batch(range(10))
    assert torch.equal(batch["views"], again["views"])
    assert not any(torch.equal(*views) for views in batch["views"])
