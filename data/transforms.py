"""Image bytes → uint8 [3, S, S]."""

import io
import math

import numpy as np
from PIL import Image

from mug.data.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 50_000_000
MAX_JPEG_SCANS = 100
CROP_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10
CROP_DRAWS = 4 * CROP_TRIES  # random numbers that `random_box` takes


def decode(data: bytes) -> Image.Image:
    """Decode a PNG, JPEG or WebP to RGB; transparent parts come out white.

    Raises:
        DataError: another format, damaged, or too large to decode safely.
    """
    # In a JPEG's compressed data 0x00 follows each 0xFF, so this counts scans (at worst, some metadata too).
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise DataError(f"a JPEG of more than {MAX_JPEG_SCANS} scans")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        pixels = image.width * image.height
        if pixels <= MAX_PIXELS:
            return _to_rgb(image)
    except Exception as error:  # on damaged bytes PIL raises a dozen kinds
        unknown = isinstance(error, Image.UnidentifiedImageError)
        raise DataError(f"not {'/'.join(FORMATS)}" if unknown else repr(error)) from error
    raise DataError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def random_box(width: int, height: int, scale: tuple[float, float], draws: np.ndarray) -> tuple[int, ...]:
    """Left, top, right, bottom of a random crop: area uniform in `scale`, log(width/height) in CROP_RATIO.

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


def _central_box(width: int, height: int, w: int, h: int) -> tuple[int, ...]:
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def train_view(image: Image.Image, size: int, box: tuple[int, ...], flip: bool) -> np.ndarray:
    """The box of an RGB image as uint8 [3, size, size], bicubic and antialiased, mirrored if `flip`."""
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    if flip:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def eval_view(image: Image.Image, size: int) -> np.ndarray:
    """The central square of an RGB image as uint8 [3, size, size]: shorter side to `size`, centre crop."""
    side = min(image.size)
    return train_view(image, size, _central_box(*image.size, side, side), flip=False)
