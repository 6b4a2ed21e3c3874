"""Which part of an image becomes a view. Boxes are (left, top, right, bottom) in pixels of the upright image."""

import math
from dataclasses import dataclass

import numpy as np

from mug.data import rng

CROP_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10
CROP_DRAWS = 4 * CROP_TRIES  # random numbers that `random_box` takes

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class ViewConfig:
    """How one of the views of a sample is cropped.

    crop_scale: min and max share of the image's area that the crop covers.
    flip: mirror half of the crops.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True


@dataclass(frozen=True, eq=False)
class RandomCrop:
    """Training: the box that `random_box` makes of `draws`, mirrored if `flip`."""

    scale: tuple[float, float]
    draws: np.ndarray  # float [CROP_DRAWS] in [0, 1)
    flip: bool

    def box(self, width: int, height: int) -> Box:
        """Returns the box within an image of this size."""
        return random_box(width, height, self.scale, self.draws)


@dataclass(frozen=True)
class CentralSquare:
    """Evaluation: the square in the middle, whose side is `fraction` of the image's shorter side."""

    fraction: float = 1.0
    flip = False

    def box(self, width: int, height: int) -> Box:
        """Returns the box within an image of this size."""
        side = max(1, round(self.fraction * min(width, height)))
        return _central_box(width, height, side, side)


Crop = RandomCrop | CentralSquare


def random_crop(config: ViewConfig, seed: int, epoch: int, position: int, view: int = 0) -> RandomCrop:
    """Returns the crop of a sample's view, a pure function of the arguments."""
    flip = config.flip and rng.uniform(seed, rng.FLIP, epoch, position, 1, view)[0] < 0.5
    draws = rng.uniform(seed, rng.CROP, epoch, position, CROP_DRAWS, view)
    return RandomCrop(tuple(config.crop_scale), draws, bool(flip))


def random_box(width: int, height: int, scale: tuple[float, float], draws: np.ndarray) -> Box:
    """Returns a random box: area uniform in `scale` of the image's, log(width/height) uniform in CROP_RATIO's.

    `draws`: float [CROP_DRAWS] in [0, 1). A box that sticks out is redrawn; after CROP_TRIES, the largest
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
