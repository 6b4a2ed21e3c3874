"""Nearest neighbours of an encoder in training, on colours that it cannot confuse and noise that nobody can tell."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from mug.model.presets import ModelConfig, resolve
from mug.run.evaluation import neighbours
from mug.run.evaluation.features import random_encoder
from mug.run.evaluation.knn import TEMPERATURE
from mug.run.evaluation.neighbours import Neighbours

CONFIG = resolve(ModelConfig(image_size=16, patch_size=8, width=32, depth=1, heads=2))


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 20)):
        for label, colour in enumerate(((120, 90, 90), (90, 120, 90), (90, 90, 120))):
            (tmp_path / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(random.normal(colour, 40, (1, 1, 3)) + random.normal(0, 5, (16, 16, 3)), 0, 255)
                path = tmp_path / split / f"class{label}" / f"{number}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path


def test_the_accuracy_is_scikit_learns_on_the_same_features(folder):
    encoder = random_encoder(CONFIG, seed=0)
    found = Neighbours(str(folder), None, 16)
    with torch.inference_mode():
        train, test = (
            encoder(torch.stack([torch.from_numpy(one.view(i, 16)) for i in range(len(one))]))[:, 1:].mean(1)
            for one in (found.train, found.test)
        )
    oracle = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / TEMPERATURE))
    expected = oracle.fit(train, found.train_labels).score(test, found.test_labels)
    assert 0.4 < expected < 0.95
    assert found.accuracy(encoder) == pytest.approx(expected, abs=1.5 / 60)


def test_large_sets_are_thinned_evenly(folder, monkeypatch):
    monkeypatch.setattr(neighbours, "MOST_TRAIN", 9)
    found = Neighbours(str(folder), None, 16)
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and found.k == 9
    assert [path.split("/")[-2:] for path in map(found.train.images.name, (0, 3))] == [
        ["class0", "0.png"],
        ["class1", "0.png"],
    ]
