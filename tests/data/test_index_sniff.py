"""What PIL writes and opens is the oracle for what the first bytes say."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mug.data import sniff
from mug.data.sniff import ALPHA, ANIMATED, CMYK, HEAD, PROGRESSIVE


def encode(format: str, mode: str = "RGB", size: tuple[int, int] = (37, 23), **options) -> bytes:
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], bands), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.frombytes(mode, size, noise.tobytes()).save(buffer, format, **options)
    return buffer.getvalue()


def look(*images: bytes) -> sniff.Sniffed:
    data = np.frombuffer(b"".join(images), np.uint8)
    length = np.array([len(image) for image in images])
    return sniff.sniff(sniff.heads_of(data, np.cumsum(length) - length, length))


MORE = {"save_all": True, "append_images": [Image.new("RGB", (37, 23), "red")]}
KINDS = [
    ("jpeg", encode("JPEG"), 0),
    ("jpeg", encode("JPEG", "L"), 0),
    ("jpeg", encode("JPEG", progressive=True), PROGRESSIVE),
    ("jpeg", encode("JPEG", "CMYK"), CMYK),
    ("jpeg", encode("JPEG", exif=b"Exif\0\0" + bytes(500)), 0),
    ("png", encode("PNG"), 0),
    ("png", encode("PNG", "RGBA"), ALPHA),
    ("png", encode("PNG", "LA"), ALPHA),
    ("png", encode("PNG", **MORE), ANIMATED),
    ("webp", encode("WEBP"), 0),
    ("webp", encode("WEBP", lossless=True), 0),
    ("webp", encode("WEBP", "RGBA"), ALPHA),
    ("webp", encode("WEBP", "RGBA", lossless=True), ALPHA),
    ("webp", encode("WEBP", **MORE), ANIMATED),
    ("gif", encode("GIF"), 0),
    ("bmp", encode("BMP"), 0),
]


@pytest.mark.parametrize(("format", "data", "flags"), KINDS, ids=[f"{i} {kind[0]}" for i, kind in enumerate(KINDS)])
def test_size_format_and_flags(format, data, flags):
    found = look(data)
    assert (found.width[0], found.height[0]) == Image.open(io.BytesIO(data)).size == (37, 23)
    assert sniff.FORMATS[found.format[0]] == format
    assert found.flags[0] == flags


def test_many_at_once_are_as_each_alone():
    together, alone = look(*(data for _, data, _ in KINDS)), [look(data) for _, data, _ in KINDS]
    for name in ("width", "height", "format", "flags"):
        assert getattr(together, name).tolist() == [int(getattr(one, name)[0]) for one in alone]


@pytest.mark.parametrize(
    ("format", "mode"), [("JPEG", "RGB"), ("PNG", "L"), ("WEBP", "RGB"), ("GIF", "L"), ("BMP", "L")]
)
@pytest.mark.parametrize("size", [(1, 1), (257, 300), (1000, 2), (3, 4097)])
def test_sizes(format, mode, size):
    found = look(encode(format, mode, size))
    assert (found.width[0], found.height[0]) == size


def test_a_bmp_whose_top_row_comes_first():
    data = bytearray(encode("BMP"))
    data[22:26] = (-23).to_bytes(4, "little", signed=True)
    assert look(bytes(data)).height[0] == Image.open(io.BytesIO(data)).size[1] == 23


def test_size_zero_where_the_first_bytes_do_not_tell():
    deep = encode("JPEG", exif=b"Exif\0\0" + bytes(HEAD))
    cut = [data[:8] for _, data, _ in KINDS]
    found = look(deep, encode("TIFF"), b"<html>404", b"", *cut)
    assert not found.width.any() and not found.height.any() and not found.flags.any()
    assert [sniff.FORMATS[f] for f in found.format[:4]] == ["jpeg", "tiff", "other", "other"]


def test_bytes_beyond_an_image_are_not_looked_at():
    found = look(encode("JPEG")[:100], encode("JPEG"))  # the first one's frame would begin in the second
    assert found.width.tolist() == [0, 37]


@given(st.sampled_from([data[:n] for _, data, _ in KINDS for n in (2, 4, 8, 16)]), st.binary(max_size=1100))
def test_any_bytes_may_come(start, noise):
    found = look(start + noise)
    assert found.width[0] >= 0 and found.height[0] >= 0
