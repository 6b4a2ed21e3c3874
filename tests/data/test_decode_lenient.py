"""Images that something can be said against, but whose pixels are whole: read as PIL reads them."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from encoded import encode
from pictures import photograph
from PIL import Image

from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.data.errors import BadSample
from mug.data.jpeg import decode_jpeg

PHOTO = photograph(160, 120)
JPEG = encode(PHOTO, "JPEG", quality=90)
RESTARTS = encode(PHOTO, "JPEG", quality=90, restart_marker_rows=1)
PROGRESSIVE = encode(PHOTO, "JPEG", quality=90, progressive=True)
PNG = encode(PHOTO)


def scan_header(data: bytes, parameters: bytes) -> bytes:
    """With other spectral parameters, which a sequential JPEG does not use: some Samsung phones write zeros."""
    at = data.rindex(b"\xff\xda")
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[: end - 3] + parameters + data[end:]


def before(data: bytes, marker: bytes, stray: bytes) -> bytes:
    at = data.index(marker)
    return data[:at] + stray + data[at:]


def before_restarts(data: bytes, stray: bytes) -> bytes:
    begin = data.rindex(b"\xff\xda")
    return data[:begin] + re.sub(rb"(\xff[\xd0-\xd7])", lambda found: stray + found[1], data[begin:])


def jfif_2(data: bytes) -> bytes:
    at = data.index(b"JFIF\0") + 5
    return data[:at] + b"\x02\x00" + data[at + 2 :]


def adobe_alone(data: bytes, transform: int) -> bytes:
    """Without JFIF, so that the transform of Adobe's segment counts."""
    at = data.index(b"\xff\xe0")
    rest = data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    return b"\xff\xd8\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform]) + rest


WHOLE = {
    "zeros in the scan header": scan_header(JPEG, b"\0\0\0"),
    "other scan parameters": scan_header(JPEG, b"\x01\x02\x03"),
    "JFIF version 2": jfif_2(JPEG),
    "JFIF version 2, progressive": jfif_2(PROGRESSIVE),
    "bytes between segments": before(JPEG, b"\xff\xdb", b"\0\0"),
    "many bytes between segments": before(JPEG, b"\xff\xc4", b"\r\n" * 20),
    "bytes between progressive segments": before(PROGRESSIVE, b"\xff\xc4", b"\x01\x02\x03"),
    "all three": before(jfif_2(scan_header(JPEG, b"\0\0\0")), b"\xff\xdb", b"\0"),
    "zeros before the end": JPEG[:-2] + bytes(7) + JPEG[-2:],
    "zeros before each restart": before_restarts(RESTARTS, bytes(3)),
    "bytes before each restart": before_restarts(RESTARTS, b"\0\0\0\1"),
    "restarts and version": jfif_2(before_restarts(RESTARTS, b"\0\0\0\1")),
    "Adobe transform 3": adobe_alone(JPEG, 3),
    "trailer": JPEG + b"SEFH" + bytes(range(200)),
}


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_jpeg_that_libjpeg_only_remarks_on_is_read_as_if_it_did_not(name, mode):
    plain = RESTARTS if "restart" in name else PROGRESSIVE if "progressive" in name else JPEG
    assert np.array_equal(*(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in (plain, WHOLE[name])))
    assert np.array_equal(*(decode_crop(data, 16, CentralSquare(), mode) for data in (plain, WHOLE[name])))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("share", [0.5, 0.75, 0.9])
def test_the_same_jpegs_cut_are_refused(name, share):
    data = WHOLE[name]
    if name == "trailer":
        data = JPEG
    with pytest.raises(BadSample, match="JPEG damaged"):
        decode_crop(data[: int(share * len(data))], 16, CentralSquare())


def noticed(data: bytes) -> int:
    """How many of 60 damages, the same for each JPEG, are refused."""
    random, scan, refused = np.random.default_rng(0), data.index(b"\xff\xda") + 14, 0
    for _ in range(60):
        damaged = bytearray(data)
        place = scan + int(random.random() * (len(data) - 200 - scan))
        damaged[place : place + 8] = random.bytes(8)
        try:
            decode_crop(bytes(damaged), 16, CentralSquare())
        except BadSample:
            refused += 1
    return refused


@pytest.mark.parametrize(
    ("plain", "remarked"),
    [(JPEG, scan_header(jfif_2(JPEG), b"\0\0\0")), (RESTARTS, before_restarts(RESTARTS, b"\0\0\0\1"))],
)
def test_damage_behind_a_remark_is_noticed_as_often_as_without(plain, remarked):
    assert noticed(remarked) >= 0.8 * noticed(plain) > 10


def test_a_missing_restart_marker_is_damage():
    data = before_restarts(RESTARTS, b"\0\0\0\1")
    at = data.index(b"\xff\xd3")
    with pytest.raises(ValueError, match="Corrupt JPEG"):
        decode_jpeg(data[:at] + data[at + 2 :])


def chunk(kind: bytes, body: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ wrong)


END = chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        PNG[: -len(END)],
        PNG[:-6],
        PNG[: -len(END)] + chunk(b"tEXt", b"Comment\0x", wrong=1) + END,
        PNG + b"trailer",
    ],
    ids=["no end", "cut in its end", "damaged remark", "trailer"],
)
def test_a_png_whose_pixels_are_whole_is_read(data):
    assert np.array_equal(decode_crop(data, 16, CentralSquare()), decode_crop(PNG, 16, CentralSquare()))


@pytest.mark.parametrize("cut", [13, 17, 40, 400])
def test_a_png_cut_within_its_pixels_is_refused(cut):
    with pytest.raises(BadSample, match="PNG damaged"):
        decode_crop(PNG[:-cut], 16, CentralSquare())


def test_a_png_is_not_unpacked_beyond_its_pixels():
    bomb = chunk(b"IDAT", zlib.compress(bytes(2**28), 9)[:-4])
    data = PNG[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)) + bomb + END[:6]
    with pytest.raises(BadSample, match="PNG damaged"):
        decode_crop(data, 16, CentralSquare())


def test_a_big_tiff_is_read():
    data = encode(PHOTO, "TIFF", big_tiff=True)
    assert data[:4] == b"II+\0"
    assert np.array_equal(decode_crop(data, 16, CentralSquare()), decode_crop(PNG, 16, CentralSquare()))
