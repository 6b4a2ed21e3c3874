"""Damaged, foreign and oversized bytes: a BadSample of one line, in little memory and time."""

import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from encoded import encode
from hypothesis import given
from hypothesis import strategies as st
from pictures import photograph

from mug.data.crops import CentralSquare
from mug.data.decode import MAX_BYTES, decode_crop
from mug.data.errors import BadSample

IMAGE = photograph(48, 36)
JPEG = encode(IMAGE, "JPEG", quality=90)
PNG = encode(IMAGE)
FORMATS = {"PNG": {}, "JPEG": {}, "GIF": {}, "BMP": {}, "WEBP": {}, "TIFF": {"compression": "tiff_lzw"}}


def reason(data: bytes) -> str:
    """Why the bytes are refused."""
    with pytest.raises(BadSample) as caught:
        decode_crop(data, 16, CentralSquare())
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Damage


@pytest.mark.parametrize("format", FORMATS)
@given(share=st.floats(0.2, 0.9))
def test_a_cut_image_is_refused(format, share):
    data = encode(IMAGE, format, **FORMATS[format])
    name = "WebP" if format == "WEBP" else format
    assert reason(data[: int(share * len(data))]).startswith(f"{name} damaged: ")


def test_a_jpeg_without_its_last_rows_is_refused_whichever_crop_is_taken():
    data = encode(photograph(300, 300), "JPEG")
    assert reason(data[: len(data) * 9 // 10]).startswith("JPEG damaged: Premature end")


def test_overwritten_jpegs_are_mostly_noticed():
    """A JPEG has no checksum: what still reads as codes passes. Pillow notices 1 in 25 of these."""
    random = np.random.default_rng(0)
    scan, noticed = JPEG.index(b"\xff\xda") + 12, 0
    for _ in range(100):
        data = bytearray(JPEG)
        for place in random.integers(scan, len(data) - 2, 3):
            data[place] = random.integers(256)
        try:
            decode_crop(bytes(data), 16, CentralSquare())
        except BadSample as error:
            assert str(error).startswith("JPEG damaged: ")
            noticed += 1
    assert noticed >= 50


@given(st.integers(8, len(PNG) - 13), st.integers(0, 7))  # up to IEND
def test_any_flipped_bit_of_a_png_is_noticed(place, bit):
    data = bytearray(PNG)
    data[place] ^= 1 << bit
    assert reason(bytes(data)).startswith("PNG ")


@pytest.mark.parametrize("format", FORMATS)
@given(noise=st.binary(min_size=1, max_size=200), place=st.integers(4, 300))
def test_damage_raises_nothing_but_bad_samples(format, noise, place):
    data = bytearray(encode(IMAGE, format, **FORMATS[format]))
    data[place : place + len(noise)] = noise
    try:
        assert decode_crop(bytes(data), 16, CentralSquare()).shape == (3, 16, 16)
    except BadSample as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html>", b"\0\0\0 ftypavif", b"%PDF-1.7", bytes(100)])
def test_what_is_no_image_is_shown(data):
    assert reason(data) == f"not an image of a supported format: it begins with {data[:12]!r}"


def test_headers_that_disagree_are_refused():
    """Pillow reads the size of the last frame header, TurboJPEG refuses a second one."""
    frame = JPEG.index(b"\xff\xc0")
    second = JPEG[frame : frame + 5] + struct.pack(">HH", 4, 4) + JPEG[frame + 9 : frame + 19]
    assert reason(JPEG[: frame + 19] + second + JPEG[frame + 19 :]).startswith("JPEG damaged: ")


# Size


def large_png(side: int) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def large_jpeg() -> bytes:
    frame = JPEG.index(b"\xff\xc0")
    return JPEG[: frame + 5] + struct.pack(">HH", 65500, 65500) + JPEG[frame + 9 :]


def large_webp() -> bytes:
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + 2 * (16382).to_bytes(3, "little")
    body = b"WEBP" + extended + encode(IMAGE, "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def patched(format: str, place: int, size: bytes) -> bytes:
    data = encode(IMAGE, format)
    return data[:place] + size + data[place + len(size) :]


def large_gif_frame() -> bytes:
    return patched("GIF", encode(IMAGE, "GIF").index(b",\0\0\0\0") + 5, b"\x20\x4e\x20\x1c")  # 20,000 x 7,200


def large_tiff() -> bytes:
    data = bytearray(encode(IMAGE, "TIFF"))
    (directory,) = struct.unpack_from("<I", data, 4)
    for entry in range(directory + 2, directory + 2 + 24, 12):  # width and height come first
        struct.pack_into("<HI", data, entry + 2, 4, 1)
        struct.pack_into("<I", data, entry + 8, 40_000)
    return bytes(data)


def many_scans() -> bytes:
    data = encode(IMAGE, "JPEG", progressive=True)
    return data[:-2] + 3000 * data[data.index(b"\xff\xda") : -2] + data[-2:]


LARGE = {
    "JPEG of 4,290,250,000 pixels is more than 50,000,000": large_jpeg(),
    "PNG of 144,000,000 pixels is more than 50,000,000": large_png(12_000),
    "PNG of 4,290,250,000 pixels is more than 50,000,000": large_png(65_500),
    "WebP of more than 50,000,000 pixels": large_webp(),
    "GIF of 4,294,836,225 pixels is more than 50,000,000": patched("GIF", 6, b"\xff\xff\xff\xff"),
    "GIF of 144,000,000 pixels is more than 50,000,000": large_gif_frame(),
    "BMP of 1,600,000,000 pixels is more than 50,000,000": patched("BMP", 18, struct.pack("<ii", 40_000, 40_000)),
    "TIFF of 1,600,000,000 pixels is more than 50,000,000": large_tiff(),
    "JPEG of more than 100 scans": many_scans(),
}

MEASURE = """
import pickle, resource, sys, time
from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.data.errors import BadSample
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
images = pickle.load(sys.stdin.buffer)
decode_crop(images.pop(), 16, CentralSquare())
before, start = peak(), time.process_time()
for data in images:
    try:
        decode_crop(data, 16, CentralSquare())
    except BadSample as error:
        print(error)
print(peak() - before, time.process_time() - start)
"""


def test_what_claims_to_be_large_is_refused_before_it_takes_memory_or_time():
    images = pickle.dumps([*LARGE.values(), JPEG])
    run = subprocess.run([sys.executable, "-c", MEASURE], input=images, capture_output=True, check=True)
    *reasons, cost = run.stdout.decode().splitlines()
    assert reasons == list(LARGE) and run.stderr == b""  # no warning of Pillow's
    mebibytes, seconds = map(float, cost.split())
    assert mebibytes < 50 and seconds < 1


def test_too_many_bytes_are_refused():
    assert reason(JPEG + bytes(MAX_BYTES)) == f"an image of {len(JPEG) + MAX_BYTES:,} bytes is more than 67,108,864"


def test_the_usual_number_of_scans_is_read():
    assert decode_crop(encode(IMAGE, "JPEG", progressive=True), 16, CentralSquare()).any()
