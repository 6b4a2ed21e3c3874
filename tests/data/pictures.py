"""Pictures to decode, and what Pillow makes of them: the oracle of the decoder's tests."""

import io

import numpy as np
from PIL import Image, ImageOps

from mug.data import rng
from mug.data.crops import CROP_DRAWS, Crop, RandomCrop


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Colours with detail at every scale, the less the finer, as photographs have; and a hard edge."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    cells = 4
    while cells < max(width, height):
        noise = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer) - 128.0) * min(0.8, 6 / cells)
        cells *= 2
    pixels[height // 3 :, width // 2 :] += 40
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def random_crop(position: int, scale: tuple[float, float] = (0.2, 1.0), flip: bool = False) -> RandomCrop:
    return RandomCrop(scale, rng.uniform(0, rng.CROP, 0, position, CROP_DRAWS), flip)


def by_pillow(data: bytes, size: int, crop: Crop) -> np.ndarray:
    """int [3, size, size]: the whole image decoded and turned, then the crop."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return by_pillow_box(image, size, crop.box(*image.size), crop.flip)


def by_pillow_box(image: Image.Image, size: int, box: tuple[int, ...], flip: bool = False) -> np.ndarray:
    view = np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
    return view[:, :, ::-1] if flip else view


def difference(view: np.ndarray, expected: np.ndarray) -> float:
    assert view.dtype == np.uint8 and view.shape == expected.shape and view.flags.c_contiguous
    return np.abs(view - expected).mean()
