"""Image bytes → uint8 [V, 3, S, S], V crops: headers and caps first, then as few pixels as will do.

Colour profiles are ignored. Animations and pages give their first picture.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
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
from PIL.TiffImagePlugin import PREFIXES as TIFF_PREFIXES
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch.nn.functional import interpolate

from mug.data.crops import Box, Crop
from mug.data.errors import BadSample
from mug.data.jpeg import decode_jpeg

MAX_BYTES = 64 * 2**20  # of an image; a larger one is neither read nor decoded
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
    **dict.fromkeys(TIFF_PREFIXES, ("TIFF", TiffImageFile)),
}

# Pillow's warnings about odd files either end as a BadSample or do not matter.
warnings.filterwarnings("ignore", module=r"PIL\.")

Mode = Literal["exact", "fast"]


def decode_crop(data: bytes, size: int, crop: Crop, mode: Mode = "exact") -> np.ndarray:
    """Returns one crop as uint8 [3, size, size]: see `decode_crops`."""
    return decode_crops(data, size, [crop], mode)[0]


def decode_crops(data: bytes, size: int, crops: Sequence[Crop], mode: Mode = "exact") -> np.ndarray:
    """Returns V crops of an image, decoded once: uint8 [V, 3, size, size], RGB, upright, transparent parts on white.

    Each is resized from its own pixels only, bicubic and antialiased. In the mode "fast", a JPEG all of whose crops
    are much larger than `size` is decoded at 1/2, 1/4 or 1/8, and the boxes are those of `fast_boxes`.
    The result depends on nothing but the arguments.

    Raises:
        BadSample: not of a supported format, damaged, or too large to decode safely; the message says which.
    """
    name, reader = _recognise(data)
    try:
        image = reader(io.BytesIO(data))
        _check_pixels(name, image)
        if name == "PNG":
            _check_png(data, limit=8 * (image.width + 1) * image.height)
        in_scales = name == "JPEG" and image.mode in ("L", "RGB")
        if not in_scales:
            image.load()  # finds EXIF that follows the pixels, and turns a TIFF upright
        turn = Turn.upright(image)
        boxes = [turn.stored_box(crop.box(*turn.size(image.size)), image.size) for crop in crops]
        if in_scales:
            scale, boxes = fast_boxes(boxes, image.size, size) if mode == "fast" else (1, boxes)
            crops_HWC = _read_jpeg(data, image.size, boxes, scale)
        else:
            crops_HWC = [np.array(_to_rgb(image.crop(box))) for box in boxes]
    except BadSample:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own, higher cap, where it comes first
        raise BadSample(f"{name} of more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # on damaged bytes Pillow raises a dozen kinds
        raise BadSample(f"{name} damaged: {' '.join(str(error).split()) or type(error).__name__}") from error
    views_VCSS = np.empty((len(crops), 3, size, size), np.uint8)
    for view_CSS, crop, pixels_HWC in zip(views_VCSS, crops, crops_HWC, strict=True):
        upright_CSS = turn.apply(_resized(pixels_HWC, size))
        view_CSS[:] = upright_CSS[:, :, ::-1] if crop.flip else upright_CSS
    return views_VCSS


def _resized(pixels_HWC: np.ndarray, size: int) -> np.ndarray:
    """uint8 [3, size, size], bicubic, antialiased."""
    image_1CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]
    return interpolate(image_1CHW, (size, size), mode="bicubic", align_corners=False, antialias=True)[0].numpy()


def _recognise(data: bytes) -> tuple[str, type[ImageFile]]:
    if len(data) > MAX_BYTES:
        raise BadSample(f"an image of {len(data):,} bytes is more than {MAX_BYTES:,}")
    for signature, (name, reader) in READERS.items():
        if data.startswith(signature):
            if name == "JPEG" and _scans(data) > MAX_JPEG_SCANS:
                raise BadSample(f"JPEG of more than {MAX_JPEG_SCANS} scans")
            return name, reader
    raise BadSample(f"not an image of a supported format: it begins with {bytes(data[:12])!r}")


def _scans(data: bytes) -> int:
    """Number of scans of a JPEG. Its compressed data has 0x00 after each 0xFF; at worst, some metadata counts too."""
    data_N = np.frombuffer(data, np.uint8)  # four times as fast as bytes.count
    return int(np.count_nonzero((data_N[:-1] == 0xFF) & (data_N[1:] == 0xDA)))


def _check_pixels(name: str, image: ImageFile) -> None:
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise BadSample(f"{name} of {pixels:,} pixels is more than {MAX_PIXELS:,}")


def _check_png(data: bytes, limit: int) -> None:
    """Compare the checksums, which loading ignores; damage after the pixels, or in comments, is accepted.

    limit: bytes that the pixels may have, unpacked.

    Raises:
        Exception: of several kinds, where a checksum of what makes the pixels does not agree, or some are missing.
    """
    try:
        PngImageFile(io.BytesIO(data)).verify()
    except Exception:
        if not _png_pixels_whole(data, limit):
            raise


def _png_pixels_whole(data: bytes, limit: int) -> bool:
    """Whether all chunks of a PNG that make its pixels agree with their checksums, and the pixels with theirs."""
    codes, at, kind = bytearray(), 8, b""
    while at + 12 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
            if data[end : end + 4] != struct.pack(">I", zlib.crc32(data[at + 4 : end])):
                return False
            codes += data[at + 8 : end] if kind == b"IDAT" else b""
        at = end + 4
    inflate, unpacked = zlib.decompressobj(), 0
    while codes and not inflate.eof and unpacked <= limit:
        unpacked += len(inflate.decompress(codes, 2**20))
        codes = inflate.unconsumed_tail
    return inflate.eof


def fast_boxes(boxes: Sequence[Box], stored: tuple[int, int], size: int) -> tuple[int, list[Box]]:
    """Returns by how much the mode "fast" divides a JPEG's sides (1, 2, 4, 8), and the boxes on that grid.

    The smallest box decides, as it needs the most detail. `stored`: the image's width and height; cells that stick
    out of it are not used.
    """
    side = min(min(right - left, bottom - top) for left, top, right, bottom in boxes)
    scale = next((scale for scale in (8, 4, 2) if side >= scale * FAST_MARGIN * size), 1)
    (width, height), half = stored, scale // 2

    def on_grid(edge: int, end: int) -> int:
        return min((edge + half) // scale, end // scale) * scale

    return scale, [
        (on_grid(left, width), on_grid(top, height), on_grid(right, width), on_grid(bottom, height))
        for left, top, right, bottom in boxes
    ]


def _read_jpeg(data: bytes, size: tuple[int, int], boxes: Sequence[Box], scale: int) -> list[np.ndarray]:
    """Returns the boxes, on the scale's grid, of a grey or RGB JPEG as uint8 [h / scale, w / scale, 3] each."""
    width, height = size
    if simplejpeg.decode_jpeg_header(data, strict=False)[:2] != (height, width):
        raise ValueError("its headers disagree on the size")
    # These minima are what the scale gives exactly. Damage that would come out as grey blocks is an error.
    pixels_HWC = decode_jpeg(data, min_height=-(-height // scale), min_width=-(-width // scale))
    on_grid = ((edge // scale for edge in box) for box in boxes)
    return [pixels_HWC[top:bottom, left:right] for left, top, right, bottom in on_grid]


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
    """How to turn the stored image upright: transposed first, then mirrored."""

    transposed: bool
    mirrored_x: bool
    mirrored_y: bool

    @staticmethod
    def upright(image: Image.Image) -> "Turn":
        """Returns what the EXIF orientation asks for; none where it is broken."""
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        except Exception:  # metadata of any kind of damage
            orientation = 1
        return Turn(orientation in (5, 6, 7, 8), orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8))

    def size(self, stored: tuple[int, int]) -> tuple[int, int]:
        """Returns width and height of the upright image."""
        return stored[::-1] if self.transposed else stored

    def stored_box(self, box: Box, stored: tuple[int, int]) -> Box:
        """Returns where a box of the upright image lies in the stored one, of this width and height."""
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
