"""Colours of views: torchvision's functions with the same factors, and choices by position alone."""

import itertools

import pytest
import torch
from torchvision.transforms.v2 import functional

from mug.model import augment
from mug.model.augment import augment_views, jitter_factors
from mug.model.objectives.objective import View

ALL = View(jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur=0.5, solarize=0.2)
ADJUST = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)


def images(count: int, side: int = 32) -> torch.Tensor:
    """uint8, smooth and noisy ones, the first of them grey and the second black."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    image = (image + 0.1 * torch.randn(count, 3, side, side, generator=generator)).clamp(0, 1)
    image[0], image[1] = image[0, :1], 0
    return (image * 255).round().to(torch.uint8)


def test_jitter_is_torchvisions_in_all_24_orders():
    orders = torch.tensor([*itertools.permutations(range(4))])
    x = images(24).float() / 255
    factors = jitter_factors((0.8, 0.8, 0.8, 0.2), torch.rand(24, 4, generator=torch.Generator().manual_seed(1)))
    expected = []
    for image, order, factor in zip(x, orders.tolist(), factors.tolist(), strict=True):
        for number in order:
            image = ADJUST[number](image, factor[number])
        expected.append(image)
    torch.testing.assert_close(augment.jitter(x, orders, factors), torch.stack(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("side", "kernel"), [(32, 3), (64, 7), (224, 23)])
def test_blur_is_torchvisions(side, kernel):
    x, sigmas = images(4, side).float() / 255, [0.1, 0.7, 1.3, 2.0]
    expected = [functional.gaussian_blur(image, [kernel] * 2, [sigma]) for image, sigma in zip(x, sigmas, strict=True)]
    torch.testing.assert_close(augment.blur(x, torch.tensor(sigmas)), torch.stack(expected), rtol=0, atol=2e-5)


def test_grey_and_solarize_are_torchvisions():
    x = images(4).float() / 255
    torch.testing.assert_close(augment.grey(x).expand_as(x), functional.rgb_to_grayscale(x, 3))
    torch.testing.assert_close(augment.solarize(x), functional.solarize(x, 0.5))


def test_factors_fill_their_ranges():
    u = torch.tensor([[0.0] * 4, [0.5] * 4, [1.0] * 4])
    expected = torch.tensor([[0.6, 0.2, 0, -0.1], [1, 1, 1.1, 0], [1.4, 1.8, 2.2, 0.1]])
    torch.testing.assert_close(jitter_factors((0.4, 0.8, 1.2, 0.1), u), expected)


def test_colours_are_functions_of_seed_position_and_view():
    views = images(40).unflatten(0, (20, 2))
    position = torch.arange(20) * 1000 + 7
    first, _ = augment_views(views, (ALL, ALL), 5, position)
    assert first.dtype == torch.float32 and first.shape == (20, 3, 32, 32)
    assert first.min() >= 0 and first.max() < 1 + 1e-5
    some = torch.tensor([11, 3])
    again, _ = augment_views(views[some], (ALL, ALL), 5, position[some])
    torch.testing.assert_close(again, first[some], rtol=0, atol=1e-6)  # a blur's sums may be taken in another order
    same = views[:, :1].expand(-1, 2, -1, -1, -1)
    assert not torch.equal(*augment_views(same, (ALL, ALL), 5, position)), "of no other view"
    other, _ = augment_views(views, (ALL, ALL), 6, position)
    assert not torch.equal(other, first)


def test_a_view_changes_by_its_own_colours_alone():
    views = images(6).unflatten(0, (3, 2))
    plain, changed = augment_views(views, (View(), View(grey=1.0)), 0, torch.arange(3))
    assert torch.equal(plain, views[:, 0] / 255)
    torch.testing.assert_close(changed[:, 0], changed[:, 2])


def changed(view: View, image: torch.Tensor) -> torch.Tensor:
    """Which of 4,000 samples, all of this image, are changed; bool [4000]."""
    before = image[None].expand(4000, -1, -1, -1)
    return (augment.augment(before, view, 3, torch.arange(4000)) - before / 255).abs().amax((1, 2, 3)) > 1e-6


def test_shares_are_those_asked_for_and_are_drawn_apart(monkeypatch):
    monkeypatch.setattr(augment, "blur", lambda x, sigma: x / 2)  # of small images it changes nearly nothing
    image = images(3, 8)[2]
    cases = {
        "jitter": (View(jitter=(0.4, 0.4, 0.4, 0.1), jitter_share=0.8), 0.8),
        "grey": (View(grey=0.2), 0.2),
        "blur": (View(blur=0.5), 0.5),
        "solarize": (View(solarize=0.3), 0.3),
    }
    found = {name: changed(view, image) for name, (view, _) in cases.items()}
    for name, (_, share) in cases.items():
        assert found[name].float().mean().item() == pytest.approx(share, abs=0.03), name
    for a, b in itertools.combinations(found, 2):
        assert torch.corrcoef(torch.stack([found[a], found[b]]).float())[0, 1].abs() < 0.06, (a, b)
    assert changed(View(blur=1.0), image).all()


def test_factors_and_orders_are_uniform(monkeypatch):
    seen = {}
    monkeypatch.setattr(augment, "jitter", lambda x, order, factor: seen.update(order=order, factor=factor) or x)
    augment.augment(images(2, 2)[:1].expand(9600, -1, -1, -1), View(jitter=(0.4, 0.4, 0.4, 0.1)), 1, torch.arange(9600))
    _, counts = seen["order"].unique(dim=0, return_counts=True)
    assert len(counts) == 24 and counts.min() > 320 and counts.max() < 480
    assert (torch.histc(seen["factor"][:, 0], 10, 0.6, 1.4) - 960).abs().max() < 120
    assert (torch.histc(seen["factor"][:, 3], 10, -0.1, 0.1) - 960).abs().max() < 120
