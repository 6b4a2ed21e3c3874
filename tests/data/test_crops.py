import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mug.data import rng
from mug.data.crops import CROP_DRAWS, CentralSquare, RandomCrop, random_box


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 2**40))
def test_random_boxes_lie_inside(width, height, position):
    draws = rng.uniform(0, rng.CROP, 0, position, CROP_DRAWS)
    left, top, right, bottom = random_box(width, height, (0.2, 1.0), draws)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert RandomCrop((0.2, 1.0), draws, flip=True).box(width, height) == (left, top, right, bottom)


def test_random_boxes_spread_over_scale_ratio_and_place():
    draws = [rng.uniform(0, rng.CROP, 0, i, CROP_DRAWS) for i in range(4000)]
    boxes = np.array([random_box(1000, 1000, (0.2, 0.5), d) for d in draws])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = w * h / 1e6, np.log(w / h)
    assert area.min() > 0.199 and area.max() < 0.501 and abs(area.mean() - 0.35) < 0.01
    assert np.abs(ratio).max() < np.log(4 / 3) + 0.01 and abs(ratio.mean()) < 0.01
    assert abs((boxes[:, 0] / (1000 - w)).mean() - 0.5) < 0.02
    assert boxes[:, 0].min() < 5 and boxes[:, 2].max() > 995


@pytest.mark.parametrize(("size", "box"), [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506))])
def test_a_strip_gets_a_central_box_of_an_allowed_ratio(size, box):
    assert random_box(*size, (1.0, 1.0), np.zeros(CROP_DRAWS)) == box


@pytest.mark.parametrize(
    ("size", "box"), [((30, 20), (5, 0, 25, 20)), ((20, 31), (0, 5, 20, 25)), ((7, 7), (0, 0, 7, 7))]
)
def test_the_central_square(size, box):
    assert CentralSquare().box(*size) == box
