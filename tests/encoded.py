"""Pictures and tars as bytes."""

import io
import tarfile
from collections.abc import Iterable

import numpy as np
from PIL import Image


def encode(image: Image.Image | np.ndarray, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def one_colour(colour: str | tuple[int, int, int] = "black", size: tuple[int, int] = (8, 8)) -> bytes:
    """A PNG."""
    return encode(Image.new("RGB", size, colour))


def tar_bytes(members: Iterable[tuple[str | tarfile.TarInfo, bytes]], format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of (name, contents)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, contents in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return buffer.getvalue()
