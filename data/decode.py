"""Image bytes → uint8 [3, S, S]: headers and caps first, then as few pixels as will do.

Colour profiles are ignored. Animations and pages give their first picture.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch.nn.functional import interpolate

from mug.data.crops import Box, Crop
from mug.data.errors import BadSample

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
MAX_JPEG_SCANS = 100
# A crop that is read smaller keeps this many times the wanted pixels a side. Against full decoding, in mean error of
# 255 on photographs: 1.2 at 1, 0.9 at 1.25, 0.4 at 2.
FAST_MARGIN = 1.25

# The first bytes choose the reader: Image.open would ask others (a JPEG may name itself an MPO), and warn of bombs.
READERS = {
    b"\xff\xd8\xff": ("JPEG", JpegImageFile),
    b"\x89PNG\r\n\x1a\n": ("PNG", PngImageFile),
    b"RIFF": ("WebP", WebPImageFile),
    b"GIF8": ("GIF", GifImageFile),
    b"BM": ("BMP", BmpImageFile),
    b"II*\0": ("TIFF", TiffImageFile),
    b"MM\0*": ("TIFF", TiffImageFile),
}

# What Pillow remarks on odd files either ends as a BadSample or does not matter.
warnings.filterwarnings("ignore", module=r"PIL\.")

Mode = Literal["exact", "fast"]


def decode_crop(data: bytes, size: int, crop: Crop, mode: Mode = "exact") -> np.ndarray:
    """The crop of an encoded image as uint8 [3, size, size], RGB, upright, transparent parts on white.

    Resized from the crop's pixels alone, bicubic and antialiased. In the mode "fast", a JPEG whose crop is much
    larger than `size` is decoded at 1/2, 1/4 or 1/8, and the box is `fast_box`'s.
    The result depends on nothing but the arguments.

    Raises:
        BadSample: not an image that is read, damaged, or too large to decode safely; says which.
    """
    name, reader = _recognise(data)
    try:
        image = reader(io.BytesIO(data))
        _check_pixels(name, image)
        if name == "PNG":
            reader(io.BytesIO(data)).verify()  # its checksums, which loading passes over
        in_scales = name == "JPEG" and image.mode in ("L", "RGB")
        if not in_scales:
            image.load()  # finds EXIF that follows the pixels, and turns a TIFF upright
        turn = Turn.upright(image)
        box = turn.stored_box(crop.box(*turn.size(image.size)), image.size)
        if in_scales:
            scale, box = fast_box(box, image.size, size) if mode == "fast" else (1, box)
            pixels_HWC = _read_jpeg(data, image.size, box, scale)
        else:
            pixels_HWC = np.array(_to_rgb(image.crop(box)))
    except BadSample:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own, higher cap, where it comes first
        raise BadSample(f"{name} of more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # on damaged bytes Pillow raises a dozen kinds
        raise BadSample(f"{name} damaged: {' '.join(str(error).split()) or type(error).__name__}") from error
    image_1CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]
    view_CSS = interpolate(image_1CHW, (size, size), mode="bicubic", align_corners=False, antialias=True)[0].numpy()
    view_CSS = turn.apply(view_CSS)
    return np.ascontiguousarray(view_CSS[:, :, ::-1] if crop.flip else view_CSS)


def _recognise(data: bytes) -> tuple[str, type[ImageFile]]:
    if len(data) > MAX_BYTES:
        raise BadSample(f"an image of {len(data):,} bytes is more than {MAX_BYTES:,}")
    for signature, (name, reader) in READERS.items():
        if data.startswith(signature):
            if name == "JPEG" and _scans(data) > MAX_JPEG_SCANS:
                raise BadSample(f"JPEG of more than {MAX_JPEG_SCANS} scans")
            return name, reader
    raise BadSample(f"not an image that is read: it begins with {bytes(data[:12])!r}")


def _scans(data: bytes) -> int:
    """Number of scans of a JPEG. Its compressed data has 0x00 after each 0xFF; at worst, some metadata counts too."""
    data_N = np.frombuffer(data, np.uint8)  # four times as fast as bytes.count
    return np.count_nonzero((data_N[:-1] == 0xFF) & (data_N[1:] == 0xDA))


def _check_pixels(name: str, image: ImageFile) -> None:
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise BadSample(f"{name} of {pixels:,} pixels is more than {MAX_PIXELS:,}")


def fast_box(box: Box, stored: tuple[int, int], size: int) -> tuple[int, Box]:
    """By how much the mode "fast" divides a JPEG's sides (1, 2, 4, 8), and the box with its edges on that grid.

    `stored`: the image's width and height; cells that stick out of it are not used.
    """
    left, top, right, bottom = box
    side = min(right - left, bottom - top)
    scale = next((scale for scale in (8, 4, 2) if side >= scale * FAST_MARGIN * size), 1)
    return scale, tuple(
        min((edge + scale // 2) // scale, end // scale) * scale for edge, end in zip(box, stored * 2, strict=True)
    )


def _read_jpeg(data: bytes, size: tuple[int, int], box: Box, scale: int) -> np.ndarray:
    """The box, on the scale's grid, of a grey or RGB JPEG as uint8 [h / scale, w / scale, 3]."""
    width, height = size
    if simplejpeg.decode_jpeg_header(data)[:2] != (height, width):
        raise ValueError("its headers disagree on the size")
    # These minima are what the scale gives exactly. Strict: damage that would come out as grey blocks is an error.
    pixels_HWC = simplejpeg.decode_jpeg(data, min_height=-(-height // scale), min_width=-(-width // scale), strict=True)
    left, top, right, bottom = (edge // scale for edge in box)
    return pixels_HWC[top:bottom, left:right]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit grey has no known range")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Turn:
    """How the upright image comes from the stored one: transposed first, then mirrored."""

    transposed: bool
    mirrored_x: bool
    mirrored_y: bool

    @staticmethod
    def upright(image: Image.Image) -> "Turn":
        """What the EXIF orientation asks for; none where it is broken."""
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        except Exception:  # metadata of any kind of damage
            orientation = 1
        return Turn(orientation in (5, 6, 7, 8), orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8))

    def size(self, stored: tuple[int, int]) -> tuple[int, int]:
        """Width and height of the upright image."""
        return stored[::-1] if self.transposed else stored

    def stored_box(self, box: Box, stored: tuple[int, int]) -> Box:
        """Where a box of the upright image lies in the stored one, of this width and height."""
        left, top, right, bottom = box
        width, height = self.size(stored)
        if self.mirrored_x:
            left, right = width - right, width - left
        if self.mirrored_y:
            top, bottom = height - bottom, height - top
        return (top, left, bottom, right) if self.transposed else (left, top, right, bottom)

    def apply(self, view_CSS: np.ndarray) -> np.ndarray:
        """Turn a square view upright."""
        if self.transposed:
            view_CSS = view_CSS.transpose(0, 2, 1)
        return view_CSS[:, :: -1 if self.mirrored_y else 1, :: -1 if self.mirrored_x else 1]
