"""Masked-patch loss and its parts against numpy in float64."""

import numpy as np
import pytest
import torch

from mug.kernels.masked_patch_loss import (
    gather_patches,
    masked_patch_loss,
    normalize_channels,
    patch_statistics,
    patchify,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def numpy_target(image, masked, patch_size, normalize, mean=MEAN, std=STD):
    """float64 [B, M, P], patch by patch; uint8 images or floats in 0..1."""
    pixels = image.astype(np.float64) / (255 if image.dtype == np.uint8 else 1)
    columns = image.shape[3] // patch_size
    rows = []
    for b, indices in enumerate(masked):
        for index in indices:
            top, left = index // columns * patch_size, index % columns * patch_size
            patch = pixels[b, :, top : top + patch_size, left : left + patch_size].transpose(1, 2, 0)
            patch = ((patch - mean) / std).flatten()
            if normalize:
                patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            rows.append(patch)
    return np.stack(rows).reshape(*masked.shape, -1)


def numpy_loss(image, prediction, masked, patch_size, normalize, **channels):
    target = numpy_target(image, masked, patch_size, normalize, **channels)
    return np.square(prediction.astype(np.float64) - target).mean()


def example(patch_size=8, size=(32, 32), B=2, M=5, seed=0):
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (B, 3, *size), dtype=np.uint8)
    patches = size[0] // patch_size * (size[1] // patch_size)
    masked = np.stack([random.permutation(patches)[:M] for _ in range(B)])
    prediction = random.standard_normal((B, M, patch_size**2 * 3)).astype(np.float32)
    return image, prediction, masked


def loss_of(image, prediction, masked, patch_size, normalize=True, mean=MEAN, std=STD):
    image, prediction, masked = (torch.as_tensor(x) for x in (image, prediction, masked))
    return masked_patch_loss(
        image, prediction, masked, patch_size=patch_size, mean=mean, std=std, normalize_patches=normalize
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "patch_size, size, M",
    [(8, (32, 32), 5), (14, (42, 42), 9), (16, (64, 48), 11), (32, (64, 64), 4), (8, (64, 8), 1)],
)
def test_uint8_images(patch_size, size, M, normalize):
    image, prediction, masked = example(patch_size, size, M=M)
    loss = loss_of(image, prediction, masked, patch_size, normalize)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(numpy_loss(image, prediction, masked, patch_size, normalize), rel=2e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_float_images_in_0_to_1(normalize):
    image, prediction, masked = example()
    image = (image / 255).astype(np.float32)
    expected = numpy_loss(image, prediction, masked, 8, normalize)
    assert loss_of(image, prediction, masked, 8, normalize).item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_flat_patches(value):
    image, prediction, masked = example()
    image[0] = value
    expected = numpy_loss(image, prediction, masked, 8, True)
    assert loss_of(image, prediction, masked, 8).item() == pytest.approx(expected, rel=5e-6)


@pytest.mark.parametrize("value", [0, 77, 255])
def test_a_patch_without_any_contrast_has_the_target_zero(value):
    image, prediction, masked = example()
    image[:] = value
    expected = np.square(prediction.astype(np.float64)).mean()
    loss = loss_of(image, prediction, masked, 8, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_saturated_pixels():
    image, prediction, masked = example()
    image = np.where(image < 128, 0, 255).astype(np.uint8)
    expected = numpy_loss(image, prediction, masked, 8, True)
    assert loss_of(image, prediction, masked, 8).item() == pytest.approx(expected, rel=2e-6)


def test_a_single_odd_pixel_in_a_flat_patch():
    image, prediction, masked = example()
    image[:] = 200
    image[:, :, ::8, ::8] = 201
    expected = numpy_loss(image, prediction, masked, 8, True)
    assert loss_of(image, prediction, masked, 8).item() == pytest.approx(expected, rel=5e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_with_a_grad_output_other_than_one(normalize):
    image, prediction, masked = example()
    x = torch.from_numpy(prediction).requires_grad_()
    (loss_of(image, x, masked, 8, normalize) * 3.7).backward()
    exact = torch.from_numpy(prediction).double().requires_grad_()
    target = torch.from_numpy(numpy_target(image, masked, 8, normalize))
    ((exact - target).square().mean() * 3.7).backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=1e-8, rtol=2e-6)


def test_bfloat16_predictions_are_compared_in_fp32():
    image, prediction, masked = example()
    x = torch.from_numpy(prediction).bfloat16().requires_grad_()
    loss = loss_of(image, x, masked, 8)
    loss.backward()
    expected = numpy_loss(image, x.detach().float().numpy(), masked, 8, True)
    assert loss.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(expected, rel=2e-6)


def test_nan_in_the_prediction_reaches_the_loss():
    image, prediction, masked = example()
    prediction[1, 2, 3] = np.nan
    assert loss_of(image, prediction, masked, 8).isnan()


def test_patches_that_are_not_masked_do_not_matter():
    image, prediction, masked = example()
    before = loss_of(image, prediction, masked, 8)
    hidden = np.zeros((2, 16), dtype=bool)
    np.put_along_axis(hidden, masked, True, axis=1)
    other = np.where(np.kron(hidden.reshape(2, 1, 4, 4), np.ones((8, 8), dtype=bool)), image, 255 - image)
    assert (other != image).any()
    assert loss_of(other, prediction, masked, 8) == before


def test_a_prediction_of_another_shape_is_named():
    image, prediction, masked = example()
    with pytest.raises(ValueError, match=r"prediction has shape \(2, 4, 192\), expected \(2, 5, 192\)"):
        loss_of(image, prediction[:, :4], masked, 8)


@pytest.mark.parametrize("size", [(30, 32), (32, 30)])
def test_an_image_that_patches_do_not_tile_is_named(size):
    image = np.zeros((2, 3, *size), dtype=np.uint8)
    _, prediction, masked = example()
    with pytest.raises(ValueError, match=rf"image \({size[0]}, {size[1]}\) is not a multiple of patch_size=8"):
        loss_of(image, prediction, masked, 8)


def test_patchify_orders_row_column_channel_in_raster_order():
    image = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(image, 2)
    assert patches.shape == (2, 6, 12)
    for n in range(6):
        top, left = n // 3 * 2, n % 3 * 2
        for row in range(2):
            for column in range(2):
                start = (row * 2 + column) * 3
                assert torch.equal(patches[:, n, start : start + 3], image[:, :, top + row, left + column])


def test_gather_patches_keeps_dtype_and_order():
    image, _, _ = example(M=3)
    image = torch.from_numpy(image)
    index = torch.tensor([[5, 0, 15], [7, 7, 1]])
    patches = gather_patches(image, index, 8)
    assert patches.dtype == torch.uint8
    for b in range(2):
        assert torch.equal(patches[b], patchify(image, 8)[b, index[b]])


def test_normalize_channels_scales_uint8_alone():
    white = torch.full((1, 1, 6), 255, dtype=torch.uint8)
    expected = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)] * 2)
    torch.testing.assert_close(normalize_channels(white, MEAN, STD)[0, 0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(normalize_channels(torch.ones(1, 1, 6), MEAN, STD)[0, 0], expected, atol=1e-6, rtol=0)


def test_patch_statistics_are_unbiased_with_eps_inside_the_root():
    x = torch.tensor([[[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]])
    mean, std = patch_statistics(x)
    torch.testing.assert_close(mean, torch.tensor([[[3.0], [4.0]]]))
    torch.testing.assert_close(std, torch.tensor([[[(7 + 1e-6) ** 0.5], [1e-3]]]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 192), (1, 5, 588), (4, 12), (2, 1, 3)], ids=str)
def test_normalize_channels_rounds_as_constants_of_fp32_do_and_copies_none(monkeypatch, shape, dtype):
    pixels = torch.randint(0, 256, shape)
    patches = pixels.to(dtype) if dtype == torch.uint8 else (pixels / 255).to(dtype)
    scale = 255 if dtype == torch.uint8 else 1
    mean, std = (torch.tensor(x) * scale for x in (MEAN, STD))
    expected = ((patches.float().unflatten(-1, (-1, 3)) - mean) / std).flatten(-2)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("copied from the host"))
    assert torch.equal(normalize_channels(patches, MEAN, STD), expected)
