"""Pictures of what the pixel decoder predicts."""

import pytest
import torch

from mug.kernels.masked_patch_loss import gather_patches, normalize_channels, patch_statistics, patchify
from mug.model.encoder import PIXEL_MEAN, PIXEL_STD

POSITION = torch.tensor([4, 11, 90])


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Oracle(torch.nn.Module):
    """A pixel decoder that knows the answer."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = prediction

    def forward(self, encoded, visible, masked):
        return self.prediction(masked)


def test_visible_patches_are_the_image_and_masked_ones_are_grey(make_model, image):
    model = make_model()
    visible, masked = model.mask(POSITION)
    hidden, painted = model.reconstruct(image, POSITION)
    for picture in (hidden, painted):
        assert picture.dtype == torch.uint8 and picture.shape == image.shape
        assert torch.equal(gather_patches(picture, visible, 8), gather_patches(image, visible, 8))
    assert (gather_patches(hidden, masked, 8) == 128).all()
    assert (gather_patches(painted, masked, 8) != gather_patches(image, masked, 8)).any()


@pytest.mark.parametrize("normalize_patches", [True, False])
def test_a_perfect_prediction_gives_the_image_back(make_model, image, normalize_patches):
    image[0, :, :16] = 255  # flat and saturated patches too
    image[1, :, 16:] = 0
    model = make_model(normalize_patches=normalize_patches)

    def target(masked):
        pixels = normalize_channels(gather_patches(image, masked, 8), PIXEL_MEAN, PIXEL_STD)
        mean, std = patch_statistics(pixels)
        return (pixels - mean) / std if normalize_patches else pixels

    model.pixel_decoder = Oracle(target)
    _, painted = model.reconstruct(image, POSITION)
    assert (painted.int() - image.int()).abs().max() <= 1


def test_a_prediction_of_zero_paints_the_mean_pixel(make_model, image):
    model = make_model(normalize_patches=False)
    model.pixel_decoder = Oracle(lambda masked: torch.zeros(*masked.shape, 192))
    masked = model.mask(POSITION)[1]
    _, painted = model.reconstruct(image, POSITION)
    pixels = gather_patches(painted, masked, 8).view(-1, 3)
    assert torch.equal(pixels, torch.tensor([[124, 116, 104]], dtype=torch.uint8).expand(len(pixels), -1))


@pytest.mark.parametrize("sign, value", [(1, 255), (-1, 0)])
def test_predictions_out_of_range_are_clamped(make_model, image, sign, value):
    model = make_model(normalize_patches=False)
    model.pixel_decoder = Oracle(lambda masked: torch.full((*masked.shape, 192), sign * 50.0))
    masked = model.mask(POSITION)[1]
    assert (gather_patches(model.reconstruct(image, POSITION)[1], masked, 8) == value).all()


def test_without_a_perfect_decoder_the_model_itself_is_asked(make_model, image):
    model = make_model(normalize_patches=False)
    visible, masked = model.mask(POSITION)
    prediction = model.pixel_decoder(model.encoder(image, visible), visible, masked)
    scale, shift = torch.tensor(PIXEL_STD).repeat(64), torch.tensor(PIXEL_MEAN).repeat(64)
    expected = ((prediction * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)
    _, painted = model.reconstruct(image, POSITION)
    assert torch.equal(patchify(painted, 8).gather(1, masked[..., None].expand(-1, -1, 192)), expected)
