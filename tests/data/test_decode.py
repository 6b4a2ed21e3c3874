"""What is decoded, against Pillow and known colours. Damage and size: test_decode_hostile.py."""

import base64
import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
import torch
from encoded import encode
from hypothesis import given
from hypothesis import strategies as st
from pictures import by_pillow, by_pillow_box, difference, photograph, random_crop
from PIL import Image
from torchvision.transforms import functional as tv

from mug.data import decode
from mug.data.crops import CentralSquare
from mug.data.decode import _read_jpeg, decode_crop, decode_crops, fast_boxes
from mug.data.errors import BadSample

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}}


def whole(data: bytes, size: int = 24) -> np.ndarray:
    """A square image of `size` as int [size, size, 3]: neither cut nor resized."""
    return decode_crop(data, size, CentralSquare()).transpose(1, 2, 0).astype(int)


# Crop and resize


@pytest.mark.parametrize("subsampling", [0, 1, 2])  # 4:4:4, 4:2:2, 4:2:0
@pytest.mark.parametrize("size", [(500, 400), (333, 517), (100, 70)])
def test_exact_mode_agrees_with_full_decoding(size, subsampling):
    data = encode(photograph(*size), "JPEG", quality=95, subsampling=subsampling)
    for position in range(4):
        crop = random_crop(position, flip=position % 2 == 1)
        view, expected = decode_crop(data, 64, crop), by_pillow(data, 64, crop)
        # Where one side grows and the other shrinks, the two passes come in another order: rounded elsewhere.
        assert difference(view, expected) <= (0.05 if min(size) > 100 else 0.25)
        assert np.abs(view - expected).max() <= 2


@pytest.mark.parametrize("size", [(500, 400), (90, 40)])
def test_other_formats_agree_with_full_decoding(size):
    data = encode(photograph(*size), "PNG")
    for crop in (random_crop(1), random_crop(2, flip=True), CentralSquare()):
        view, expected = decode_crop(data, 64, crop), by_pillow(data, 64, crop)
        assert difference(view, expected) <= 0.05 and np.abs(view - expected).max() <= 2


@pytest.mark.parametrize("size", [(200, 280), (280, 200), (128, 128)])
def test_the_evaluation_view_agrees_with_torchvision(size):
    image = photograph(*size)
    resized = tv.resize(image, 50, tv.InterpolationMode.BICUBIC, antialias=True)
    expected = np.asarray(tv.center_crop(resized, [50, 50])).transpose(2, 0, 1).astype(int)
    view = decode_crop(encode(image), 50, CentralSquare())
    assert np.abs(view - expected)[:, 2:-2, 2:-2].max() <= 2  # at the rim, torchvision sees beyond the square


def test_a_very_large_reduction_keeps_a_flat_colour():
    data = encode(Image.new("RGB", (5000, 4000), (255, 128, 0)), "BMP")
    assert (whole(data, 8) == [255, 128, 0]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_tiny_images(size):
    data = encode(Image.new("RGB", size, (10, 200, 30)), "PNG")
    assert (decode_crop(data, 16, random_crop(0)) == np.array([10, 200, 30])[:, None, None]).all()


def test_the_same_bytes_in_any_thread():
    data = [encode(photograph(300, 200, seed), "JPEG") for seed in range(3)] * 4
    alone = [decode_crop(d, 64, random_crop(i)).tobytes() for i, d in enumerate(data)]
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    with ThreadPoolExecutor(4) as pool:
        views = pool.map(lambda i: decode_crop(data[i], 64, random_crop(i)).tobytes(), range(len(data)))
        assert list(views) == alone
    torch.set_num_threads(threads)


# The mode "fast"


@pytest.mark.parametrize(("size", "scale"), [((300, 230), 2), ((301, 229), 2), ((515, 402), 4), ((1021, 803), 8)])
def test_fast_mode_stays_near_full_decoding(size, scale):
    data = encode(photograph(*size), "JPEG", quality=95)
    image = Image.open(io.BytesIO(data))
    for position in range(3):
        crop = random_crop(position, (0.9, 1.0), flip=position == 1)
        used, (box,) = fast_boxes([crop.box(*size)], size, 64)
        assert used == scale
        view = decode_crop(data, 64, crop, "fast")
        assert 0 < difference(view, by_pillow_box(image, 64, box, crop.flip)) <= 1.0
        assert (view != decode_crop(data, 64, crop, "exact")).any()


def test_fast_mode_is_exact_where_the_crop_is_small():
    data = encode(photograph(500, 400), "JPEG", quality=95)
    assert (decode_crop(data, 224, random_crop(0), "fast") == decode_crop(data, 224, random_crop(0))).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_several_crops_are_what_each_is_alone_and_the_image_is_decoded_once(format, monkeypatch):
    data = with_orientation(photograph(230, 170), format, 6)
    crops = [random_crop(0), random_crop(1, flip=True), CentralSquare(0.5)]
    alone = [decode_crop(data, 48, crop) for crop in crops]
    decoded = []
    monkeypatch.setattr(decode, "decode_jpeg", lambda *a, of=decode.decode_jpeg, **k: decoded.append(1) or of(*a, **k))
    views_VCSS = decode_crops(data, 48, crops)
    assert views_VCSS.dtype == np.uint8 and np.array_equal(views_VCSS, np.stack(alone))
    assert len(decoded) == (format == "JPEG")


def test_fast_mode_reads_several_crops_at_the_scale_that_the_smallest_needs():
    data = encode(photograph(1021, 803), "JPEG", quality=95)
    large, middle, small = random_crop(0, (0.9, 1.0)), random_crop(2, (0.1, 0.1)), CentralSquare(0.15)
    scales = {id(crop): fast_boxes([crop.box(1021, 803)], (1021, 803), 64)[0] for crop in (large, middle, small)}
    assert list(scales.values()) == [8, 2, 1]
    both = decode_crops(data, 64, [large, middle], "fast")
    scale, boxes = fast_boxes([large.box(1021, 803), middle.box(1021, 803)], (1021, 803), 64)
    assert scale == 2 and np.array_equal(both[1], decode_crop(data, 64, middle, "fast"))
    image = Image.open(io.BytesIO(data))
    assert difference(both[0], by_pillow_box(image, 64, boxes[0])) <= 1.0
    exact = decode_crops(data, 64, [large, middle, small], "fast")
    assert np.array_equal(exact, decode_crops(data, 64, [large, middle, small], "exact"))


@pytest.mark.parametrize(
    ("box", "scaled"),
    [
        ((0, 0, 279, 400), (1, (0, 0, 279, 400))),
        ((3, 0, 563, 560), (2, (4, 0, 564, 560))),  # 560 = 2 x 280, and 280 is 1.25 x 224
        ((1, 2, 1125, 1121), (2, (2, 2, 1126, 1122))),
        ((1, 2, 1125, 1122), (4, (0, 4, 1124, 1124))),
        ((5, 3, 9004, 9003), (8, (8, 0, 9000, 9000))),  # 9004 is nearer to 9008, which is outside
    ],
)
def test_boxes_of_fast_mode(box, scaled):
    scale, expected = scaled
    assert fast_boxes([box], (9006, 9006), 224) == (scale, [expected])


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 4, 8]))
def test_a_scaled_jpeg_has_a_pixel_for_each_cell_of_the_grid(width, height, scale):
    data = encode(Image.new("RGB", (width, height)), "JPEG")
    right, bottom = -(-width // scale), -(-height // scale)
    box = (0, 0, right * scale, bottom * scale)
    assert _read_jpeg(data, (width, height), [box], scale)[0].shape == (bottom, right, 3)


# Colours


@pytest.mark.parametrize("format", LOSSLESS)
def test_lossless_formats_come_back_exactly(format):
    assert (whole(encode(PIXELS, format, **LOSSLESS[format])) == PIXELS).all()


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF"])
def test_grey_one_bit_and_palette(format):
    assert (whole(encode(PIXELS[..., 0], format)) == PIXELS[..., :1]).all()
    one_bit = Image.fromarray(PIXELS[..., 0] > 127)
    assert (whole(encode(one_bit, format)) == 255 * (PIXELS[..., :1] > 127)).all()
    palette = Image.fromarray(PIXELS).quantize(16)
    assert (whole(encode(palette, format)) == np.asarray(palette.convert("RGB"))).all()


def png(header: bytes, rows: bytes) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])  # grey, RGB, grey + alpha, RGBA
def test_sixteen_bit_png_is_scaled_not_clipped(kind, channels):
    deep = np.full((24, 24, channels), 65535, ">u2")
    deep[..., : min(channels, 3) if channels != 2 else 1] = PIXELS[..., :1].astype(">u2") * 256 + 7
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    assert (whole(png(struct.pack(">IIBBBBB", 24, 24, 16, kind, 0, 0, 0), rows)) == PIXELS[..., :1]).all()


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_tiff(order):
    assert (whole(encode(PIXELS[..., 0].astype(order) * 256, "TIFF")) == PIXELS[..., :1]).all()


def test_thirty_two_bit_grey_is_refused():
    with pytest.raises(BadSample, match=r"^TIFF damaged: 32-bit grey"):
        whole(encode(PIXELS[..., 0].astype(np.float32), "TIFF"))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_are_on_white(format, mode):
    if (format, mode) == ("WEBP", "LA"):
        pytest.skip("WebP has no grey")
    colour = PIXELS if mode == "RGBA" else PIXELS[..., :1].repeat(3, 2)
    alpha = np.zeros((24, 24), dtype=np.uint8)
    alpha[:, 8:16], alpha[:, 16:] = 255, 51
    image = Image.fromarray(colour).convert("RGB" if mode == "RGBA" else "L")
    image.putalpha(Image.fromarray(alpha))
    out = whole(encode(image, format, **(LOSSLESS[format] | ({"exact": True} if format == "WEBP" else {}))))
    assert (out[:, :8] == 255).all() and (out[:, 8:16] == colour[:, 8:16]).all()
    assert np.abs(out[:, 16:] - (0.2 * colour[:, 16:] + 0.8 * 255)).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_palette_colour_is_white(format):
    image = Image.new("P", (24, 24), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    out = whole(encode(image, format, transparency=0))
    assert out[0, 0].tolist() == [255, 255, 255] and out[1, 1].tolist() == [10, 20, 30]


def test_a_transparent_rgb_colour_is_white():
    image = Image.new("RGB", (24, 24), (10, 20, 30))
    image.putpixel((0, 0), (1, 2, 3))
    out = whole(encode(image, transparency=(1, 2, 3)))
    assert out[0, 0].tolist() == [255, 255, 255] and out[1, 1].tolist() == [10, 20, 30]


ARITHMETIC = base64.b64decode(  # 16 x 16 of (200, 100, 50), arithmetic coding
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYGCAsICQoKCgoKBggLDAsK"
    "DAkKCgr/2wBDAQICAgICAgUDAwUKBwYHCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgr/yQARCAAQABAD"
    "ASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD+Lusus28g/9k="
)


def flat(mode: str, colour: int | tuple[int, ...], **options) -> bytes:
    return encode(Image.new(mode, (16, 16), colour), "JPEG", quality=95, **options)


def ycck() -> bytes:
    """Cyan. TurboJPEG stores CMYK as YCCK; that JPEGs hold it inverted is Adobe's custom, which it leaves to us."""
    inverted = np.full((16, 16, 4), (0, 255, 255, 255), np.uint8)
    return simplejpeg.encode_jpeg(inverted, quality=95, colorspace="CMYK")


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (flat("RGB", (200, 100, 50)), (200, 100, 50)),
        (flat("RGB", (200, 100, 50), progressive=True), (200, 100, 50)),
        (flat("RGB", (200, 100, 50), keep_rgb=True), (200, 100, 50)),
        (flat("L", 77), (77, 77, 77)),
        (flat("CMYK", (255, 0, 0, 0)), (0, 255, 255)),
        (flat("CMYK", (0, 0, 0, 204)), (51, 51, 51)),
        (ycck(), (0, 255, 255)),
        (ARITHMETIC, (200, 100, 50)),
    ],
    ids=["YCbCr", "progressive", "RGB", "grey", "cyan", "key", "YCCK", "arithmetic"],
)
def test_colours_of_jpegs(data, colour):
    assert np.abs(whole(data, 16) - colour).max() <= 2


def test_twelve_bit_jpeg_is_refused():
    data = flat("RGB", (200, 100, 50))
    frame = data.index(b"\xff\xc0")
    with pytest.raises(BadSample, match=r"^JPEG damaged: .*12"):
        whole(data[: frame + 4] + b"\x0c" + data[frame + 5 :], 16)


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_the_first_of_several_pictures(format, options):
    first, *others = (Image.new("RGB", (24, 24), colour) for colour in ((200, 100, 50), (0, 0, 255), (0, 255, 0)))
    data = encode(first, format, save_all=True, append_images=others, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(whole(data) - (200, 100, 50)).max() == 0


def test_no_other_plugin_of_pillow_runs():
    """A JPEG of several pictures is another plugin's to Pillow; so is a picture of ours under another name."""
    pair = Image.new("RGB", (16, 16), (0, 255, 255))
    code = """
import sys
data = eval(sys.stdin.read())
from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
print([decode_crop(d, 16, CentralSquare())[:, 0, 0].tolist() for d in data])
print(sorted(name for name in sys.modules if name.endswith("ImagePlugin")))
"""
    data = [encode(pair, "MPO", save_all=True, append_images=[pair]), encode(PIXELS), encode(PIXELS, "TIFF")]
    assert Image.open(io.BytesIO(data[0])).format == "MPO"
    run = subprocess.run([sys.executable, "-c", code], input=repr(data), capture_output=True, text=True)
    colours, plugins = run.stdout.splitlines()
    assert np.abs(np.array(eval(colours)[0]) - (0, 255, 255)).max() <= 2 and not run.stderr
    assert eval(plugins) == [f"PIL.{n}ImagePlugin" for n in ("Bmp", "Gif", "Jpeg", "Png", "Tiff", "WebP")]


# EXIF


def with_orientation(image: Image.Image, format: str, orientation: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, format, exif=exif, **LOSSLESS.get(format, {"quality": 95, "subsampling": 0}))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_and_crop_agree_with_pillow(format, orientation):
    data = with_orientation(photograph(200, 140), format, orientation)
    for crop in (random_crop(3), random_crop(4, (0.1, 0.3), flip=True), CentralSquare()):
        view, expected = decode_crop(data, 48, crop), by_pillow(data, 48, crop)
        # On their sides, the resize's two passes come in another order: rounded elsewhere.
        assert difference(view, expected) <= (0.05 if orientation < 5 or format == "TIFF" else 0.25)
        assert np.abs(view - expected).max() <= 3


# Where EXIF's definition puts the stored image's first row and first column in the upright one.
CORNERS = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
CORNERS |= {5: "top left", 6: "top right", 7: "bottom right", 8: "bottom left"}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_stored_first_corner_comes_where_exif_says(orientation, flip):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:16, :16] = 255, 0, 0
    pixels[:16, 48:] = 0, 255, 0  # the other end of the first row
    data = with_orientation(Image.fromarray(pixels), "JPEG", orientation)
    view = decode_crop(data, 64, random_crop(0, (1.0, 1.0), flip)).transpose(1, 2, 0)
    red, green = (np.argwhere(view[..., channel] > 128).mean(0) for channel in (0, 1))
    (y, x), mirrored = red, 63 - red[1] if flip else red[1]
    assert ("top" if y < 32 else "bottom") + (" left" if mirrored < 32 else " right") == CORNERS[orientation]
    assert (abs(green[0] - y) < 8) == (orientation < 5) and (abs(green[1] - x) < 8) == (orientation >= 5)


def test_fast_mode_turns_too():
    data, crop = with_orientation(photograph(300, 230), "JPEG", 6), random_crop(0, (0.9, 1.0))
    left, top, right, bottom = crop.box(230, 300)  # upright; stored, the right side is the top
    scale, (box,) = fast_boxes([(top, 230 - right, bottom, 230 - left)], (300, 230), 64)
    expected = np.rot90(by_pillow_box(Image.open(io.BytesIO(data)), 64, box), -1, axes=(1, 2))
    assert scale == 2 and difference(decode_crop(data, 64, crop, "fast"), expected) <= 1.0


BROKEN_EXIF = {
    "cut": b"Exif\0\0II*\0",
    "noise": b"Exif\0\0" + b"\xff" * 40,
    "no entries": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
    "text for a number": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x026\0\0\0\0\0\0\0",
    "nothing": b"Exif",
}


@pytest.mark.parametrize("exif", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
def test_broken_exif_is_ignored(exif):
    image = photograph(64, 64)
    plain, broken = (encode(image, "JPEG", **options) for options in ({}, {"exif": exif}))
    assert (whole(plain, 64) == whole(broken, 64)).all() and exif in broken


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation):
    image = photograph(64, 64)
    assert (whole(with_orientation(image, "PNG", orientation), 64) == np.asarray(image)).all()
