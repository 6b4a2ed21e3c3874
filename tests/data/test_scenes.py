"""Scenes of OpenMoji's drawings: labels against the pixels they stand for."""

import io
from pathlib import Path

import numpy as np
import pytest
import resvg_py
from PIL import Image

from mug.data.builders import openmoji_scenes as scenes
from mug.data.builders.openmoji import drawings, group_of, pairs
from mug.data.builders.openmoji_scenes import CLASSES, FIGURES, MIN_SIDE, SIDE, build, class_of, compose


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("1F600", "face"),
        ("1F436", "animal"),
        ("1F34E", "food"),
        ("1F697", "vehicle"),
        ("1F554", "clock"),
        ("1F1EB-1F1F7", "flag"),
        ("1F468-1F3FD-200D-1F692", "person"),
        ("1F44B-1F3FB", "person"),
        ("2764-FE0F", "ground"),
    ],
)
def test_classes_are_what_the_drawings_show(key, name):
    assert CLASSES[class_of(key)] == name


def test_one_figure_covers_what_its_alpha_covers():
    draws = np.zeros(7 + 5 * FIGURES)
    draws[1:7] = (0, 0, 0, 0.999, 0.999, 0.999)  # grey 120 at the left, 254 at the right
    draws[7:12] = (0.9, 0.0, 0.0, 0.25, 0.75)  # the last class, smallest; a quarter from the left, three from the top
    image, labels = compose([[], ["1F554"]], draws)
    png = resvg_py.svg_to_bytes(
        svg_path=str(drawings() / "1F554.svg"), skip_system_fonts=True, width=MIN_SIDE, height=MIN_SIDE
    )
    alpha = np.asarray(Image.open(io.BytesIO(bytes(png))))[..., 3]
    left, top = int(0.25 * (SIDE - MIN_SIDE + 1)), int(0.75 * (SIDE - MIN_SIDE + 1))
    expected = np.zeros((SIDE, SIDE), bool)
    expected[top : top + MIN_SIDE, left : left + MIN_SIDE] = alpha >= 128
    assert set(np.unique(labels)) == {0, 2}
    assert ((labels == 2) != expected).mean() < 0.003, "but for the edge, which another rasteriser blurs another way"
    assert abs(int((labels == 2).sum()) - int(expected.sum())) < 12, "and that by no more than it gains"
    pixels = np.asarray(image).astype(float)
    far = np.ones((SIDE, SIDE), bool)
    far[top : top + MIN_SIDE, left : left + MIN_SIDE] = False
    ground = np.broadcast_to(np.linspace(120, 120 + 135 * 0.999, SIDE)[None, :, None], pixels.shape)
    assert np.abs(pixels - ground)[far].max() <= 1
    assert np.abs(pixels - ground)[labels == 2].mean() > 20


def test_a_later_figure_covers_an_earlier_one():
    draws = np.zeros(7 + 5 * FIGURES)
    draws[0] = 0.3  # two figures
    draws[7:12], draws[12:17] = (0.0, 0, 0.5, 0.5, 0.5), (0.9, 0, 0.0, 0.5, 0.5)
    _, alone = compose([["1F1EB-1F1F7"], ["1F554"]], np.concatenate([[0.0], draws[1:]]))
    _, labels = compose([["1F1EB-1F1F7"], ["1F554"]], draws)
    assert labels[SIDE // 2, SIDE // 2] == 2 and alone[SIDE // 2, SIDE // 2] == 1
    changed = labels != alone
    assert (labels[changed] == 2).all() and changed.any() and (labels == 1).any()


@pytest.mark.slow
def test_a_build_is_in_ade20ks_layout_and_always_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "SCENES", {"training": 6, "validation": 3})
    used: dict[str, set[str]] = {}
    drawn = scenes.drawing.__wrapped__
    for name in ("first", "second"):
        used[name] = set()
        monkeypatch.setattr(scenes, "drawing", lambda key, name=name: used[name].add(key) or drawn(key))
        (tmp_path / name).mkdir()
        build(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    expected = [
        Path(f"{kind}/{split}/{i:05}.png")
        for kind in ("annotations", "images")
        for split, n in scenes.SCENES.items()
        for i in range(n)
    ]
    assert files == sorted([*expected, Path("classes.txt")])
    assert all((tmp_path / "first" / f).read_bytes() == (tmp_path / "second" / f).read_bytes() for f in files)
    assert (tmp_path / "first" / "classes.txt").read_text().split() == list(CLASSES)
    labels = np.asarray(Image.open(tmp_path / "first/annotations/training/00000.png"))
    assert labels.dtype == np.uint8 and labels.shape == (SIDE, SIDE) and 0 < labels.max() < len(CLASSES)


def test_no_emoji_is_in_both_splits(monkeypatch, tmp_path):
    seen: list[list[list[str]]] = []
    blank = Image.new("RGB", (1, 1)), np.zeros((1, 1), np.uint8)
    monkeypatch.setattr(scenes, "compose", lambda by_class, draws: seen.append(by_class) or blank)
    monkeypatch.setattr(scenes, "SCENES", {"training": 1, "validation": 1})
    build(tmp_path)
    groups = [{group_of(key) for keys in by_class for key in keys} for by_class in seen]
    assert not groups[0] & groups[1]
    assert all(len(keys) >= 5 for by_class in seen for keys in by_class), "every class is in both"
    assert sum(len(keys) for by_class in seen for keys in by_class) == sum(class_of(key) > 0 for key in pairs())
