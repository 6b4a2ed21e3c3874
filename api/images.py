"""Images as callers hold them, paths, PIL images or arrays, as the bytes and pixels that training reads."""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.data.errors import BadSample, DataError

# What `Model` and `train` take: a path; a PIL image; or an array, uint8 [H, W], [H, W, 3] or [H, W, 4].
ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray

NOT_IN_PNG = ("CMYK", "YCbCr", "LAB", "HSV")


def image_bytes(image: ImageLike) -> bytes:
    """Returns the bytes of an image file; those of a PIL image or an array are a PNG's, upright and without loss.

    Raises:
        BadSample: the file cannot be read, or the array or image has no meaning as a picture.
    """
    if isinstance(image, str | os.PathLike):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise BadSample(f"cannot be read: {error.strerror}") from error
        except ValueError as error:  # NUL in a path
            raise BadSample(f"cannot be read: {error}") from error
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise BadSample(f"a {type(image).__name__}: give a path, a PIL image or a uint8 array [H, W, 3]")
    upright = ImageOps.exif_transpose(image)
    buffer = io.BytesIO()
    try:
        (upright.convert("RGB") if upright.mode in NOT_IN_PNG else upright).save(buffer, "PNG", compress_level=1)
    except (OSError, ValueError) as error:
        raise BadSample(f"a PIL image of mode {image.mode}, size {image.size}: {error}; convert it to RGB") from error
    return buffer.getvalue()


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2:]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in ((), (3,), (4,)):
        raise BadSample(
            f"an array of {array.dtype} {list(array.shape)}: give uint8 [H, W], [H, W, 3] (RGB) or [H, W, 4]"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def squares(images: Iterable[ImageLike], size: int, batch: int) -> Iterator[Tensor]:
    """Yields the central squares of at most `batch` images at a time, uint8 [B, 3, size, size].

    Raises:
        DataError: an image cannot be read; it is named by its path, or by its place from 0 on.
    """
    chunk: list[np.ndarray] = []
    for number, image in enumerate(images):
        try:
            chunk.append(decode_crop(image_bytes(image), size, CentralSquare()))
        except BadSample as error:
            raise DataError(f"{name_of(image, number)}: {error}") from error
        if len(chunk) == batch:
            yield torch.from_numpy(np.stack(chunk))
            chunk = []
    if chunk:
        yield torch.from_numpy(np.stack(chunk))


def name_of(image: Any, number: int) -> str:
    """Returns a name of an image for a message."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {number}"
