"""Which part of an image becomes a view. Boxes are (left, top, right, bottom) in pixels of the upright image."""

import math
from dataclasses import dataclass

import numpy as np

CROP_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10
CROP_DRAWS = 4 * CROP_TRIES  # random numbers that `random_box` takes

Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class RandomCrop:
    """Training: the box that `random_box` makes of `draws`, mirrored if `flip`."""

    scale: tuple[float, float]
    draws: np.ndarray  # float [CROP_DRAWS] in [0, 1)
    flip: bool

    def box(self, width: int, height: int) -> Box:
        """The box within an image of this size."""
        return random_box(width, height, self.scale, self.draws)


@dataclass(frozen=True)
class CentralSquare:
    """Evaluation: the square in the middle, whose side is `fraction` of the image's shorter side."""

    fraction: float = 1.0
    flip = False

    def box(self, width: int, height: int) -> Box:
        """The box within an image of this size."""
        side = max(1, round(self.fraction * min(width, height)))
        return _central_box(width, height, side, side)


Crop = RandomCrop | CentralSquare


def random_box(width: int, height: int, scale: tuple[float, float], draws: np.ndarray) -> Box:
    """A random box: area uniform in `scale` of the image's, log(width/height) uniform in CROP_RATIO's.

    `draws`: float [CROP_DRAWS] in [0, 1). A box that sticks out is drawn anew; after CROP_TRIES, the largest
    central box of an allowed ratio.
    """
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    for u_area, u_ratio, u_left, u_top in draws.reshape(CROP_TRIES, 4).tolist():
        area = width * height * (scale[0] + u_area * (scale[1] - scale[0]))
        ratio = math.exp(low + u_ratio * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u_left * (width - w + 1)), int(u_top * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    return _central_box(width, height, w, h)


def _central_box(width: int, height: int, w: int, h: int) -> Box:
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
