import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as tv

from mug.data import rng, transforms
from mug.data.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = transforms.decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("options", [{"format": "PNG"}, {"format": "WEBP", "lossless": True}])
def test_lossless_formats_come_back_exactly(options):
    assert (decoded(encode(Image.fromarray(PIXELS), **options)) == PIXELS).all()


def test_grey_and_palette():
    grey = Image.fromarray(PIXELS[..., 0])
    assert (decoded(encode(grey)) == PIXELS[..., :1]).all()
    palette = Image.fromarray(PIXELS).quantize(16)
    assert (decoded(encode(palette)) == np.asarray(palette.convert("RGB"))).all()


def test_sixteen_bit_grey_is_scaled_not_clipped():
    deep = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    assert (decoded(encode(deep)) == PIXELS[..., :1]).all()


def test_transparent_parts_are_white():
    alpha = np.zeros((20, 30, 1), dtype=np.uint8)
    alpha[:, 10:20], alpha[:, 20:] = 255, 51
    out = decoded(encode(Image.fromarray(np.concatenate([PIXELS, alpha], 2))))
    assert (out[:, :10] == 255).all()
    assert (out[:, 10:20] == PIXELS[:, 10:20]).all()
    expected = 0.2 * PIXELS[:, 20:] + 0.8 * 255
    assert np.abs(out[:, 20:] - expected).max() <= 1


def test_a_transparent_palette_colour_is_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    out = decoded(encode(image, transparency=0))
    assert out[0, 0].tolist() == [255, 255, 255] and out[1, 1].tolist() == [10, 20, 30]


def test_cmyk_jpeg():
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    out = decoded(encode(image, "JPEG", quality=95))
    assert np.abs(out.astype(int) - [0, 255, 255]).max() <= 3


def bomb(width: int, height: int) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8000, 65500])
def test_bombs_are_refused(side):
    with pytest.raises(DataError, match="pixels"):
        transforms.decode(bomb(side, side))


def test_a_jpeg_of_endless_scans_is_refused():
    jpeg = encode(Image.fromarray(PIXELS), "JPEG", progressive=True)
    decoded(jpeg)
    scan = jpeg[jpeg.index(b"\xff\xda") : -2]
    with pytest.raises(DataError, match="scans"):
        transforms.decode(jpeg[:-2] + scan * 100 + jpeg[-2:])


@pytest.mark.parametrize("data", [b"", b"<html>", encode(Image.fromarray(PIXELS), "GIF")])
def test_other_formats_are_refused(data):
    with pytest.raises(DataError, match="not PNG/JPEG/WEBP"):
        transforms.decode(data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@given(share=st.floats(0.05, 0.9))
def test_truncated_images_are_refused(format, share):
    data = encode(Image.fromarray(PIXELS), format)
    with pytest.raises(DataError):
        transforms.decode(data[: int(share * len(data))])


@given(st.binary(max_size=200))
def test_damage_raises_nothing_but_data_errors(noise):
    data = bytearray(encode(Image.fromarray(PIXELS)))
    data[40 : 40 + len(noise)] = noise
    try:
        transforms.decode(bytes(data))
    except DataError as error:
        assert "\n" not in str(error)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 2**40))
def test_random_boxes_lie_inside(width, height, position):
    draws = rng.uniform(0, rng.CROP, 0, position, transforms.CROP_DRAWS)
    left, top, right, bottom = transforms.random_box(width, height, (0.2, 1.0), draws)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_random_boxes_spread_over_scale_ratio_and_place():
    draws = [rng.uniform(0, rng.CROP, 0, i, transforms.CROP_DRAWS) for i in range(4000)]
    boxes = np.array([transforms.random_box(1000, 1000, (0.2, 0.5), d) for d in draws])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = w * h / 1e6, np.log(w / h)
    assert area.min() > 0.199 and area.max() < 0.501 and abs(area.mean() - 0.35) < 0.01
    assert np.abs(ratio).max() < np.log(4 / 3) + 0.01 and abs(ratio.mean()) < 0.01
    assert abs((boxes[:, 0] / (1000 - w)).mean() - 0.5) < 0.02
    assert boxes[:, 0].min() < 5 and boxes[:, 2].max() > 995


@pytest.mark.parametrize(("size", "box"), [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506))])
def test_a_strip_gets_a_central_box_of_an_allowed_ratio(size, box):
    assert transforms.random_box(*size, (1.0, 1.0), np.zeros(transforms.CROP_DRAWS)) == box


def test_train_view_agrees_with_torchvision():
    image = Image.fromarray(PIXELS).resize((300, 200), Image.Resampling.BICUBIC)
    left, top, right, bottom = 50, 20, 210, 150
    expected = tv.resized_crop(
        image, top, left, bottom - top, right - left, [64, 64], tv.InterpolationMode.BICUBIC, antialias=True
    )
    expected = np.asarray(expected).transpose(2, 0, 1).astype(int)
    view = transforms.train_view(image, 64, (left, top, right, bottom), flip=False)
    assert view.dtype == np.uint8 and view.shape == (3, 64, 64)
    inside = np.s_[:, 2:-2, 2:-2]  # at the rim, we see what lies beyond the crop; torchvision has cut it off
    assert np.abs(view - expected)[inside].max() <= 1
    flipped = transforms.train_view(image, 64, (left, top, right, bottom), flip=True)
    assert (flipped == view[:, :, ::-1]).all()


@pytest.mark.parametrize("size", [(200, 280), (280, 200), (128, 128)])
def test_eval_view_agrees_with_torchvision(size):
    image = Image.fromarray(PIXELS).resize(size, Image.Resampling.BICUBIC)
    resized = tv.resize(image, 50, tv.InterpolationMode.BICUBIC, antialias=True)
    expected = np.asarray(tv.center_crop(resized, [50, 50])).transpose(2, 0, 1).astype(int)
    view = transforms.eval_view(image, 50)
    assert view.shape == (3, 50, 50)
    assert np.abs(view - expected).max() <= 2


def test_eval_view_is_the_central_square():
    view = transforms.eval_view(Image.fromarray(PIXELS), 20)
    assert (view == PIXELS[:, 5:25].transpose(2, 0, 1)).all()
