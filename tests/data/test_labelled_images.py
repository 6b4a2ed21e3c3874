"""Labelled images by position, and when those of a run that resumes are the same."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mug.data.augment import Augment, AugmentConfig
from mug.data.errors import DataError
from mug.data.kinds.labelled import LabelledConfig, LabelledImages, open_train
from mug.data.kinds.samples import Shape
from mug.data.labelled_sources import open_folder
from mug.data.order import Order
from mug.data.stream import BatchShard, TrainStream
from mug.data.views import EvaluationView, TrainView

PLAIN = AugmentConfig(rand_augment=None, erase=0, mixup=0, cutmix=0, label_smoothing=0)


def images(tmp_path, augment: Augment | None, seed: int = 0) -> LabelledImages:
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


@pytest.fixture
def folders(tmp_path) -> Path:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (8 + number, 8), name == "cat" and "red").save(
                    tmp_path / "images" / split / name / f"{number}.png"
                )
    return tmp_path / "images"


def train_stream(folder: Path) -> TrainStream:
    config = LabelledConfig(images=str(folder), workers=0)
    return TrainStream(open_train(config, 0, Shape(16)), BatchShard(4, 4, 0, 1), 0)


def test_images_that_were_copied_or_touched_are_the_same(folders):
    stream = train_stream(folders)
    state = stream.state_dict()
    copy = folders.with_name("copy")
    shutil.copytree(folders, copy, copy_function=shutil.copyfile)  # as `cp -r`, without times
    for path in folders.rglob("*.png"):
        os.utime(path, (0, 0))
    for folder in (folders, copy):
        train_stream(folder).load_state_dict(state)
    (copy / "train" / "cat" / "0.png").write_bytes(b"an image of another size")
    with pytest.raises(DataError, match="fingerprint"):
        train_stream(copy).load_state_dict(state)
