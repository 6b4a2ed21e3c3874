"""timm's augmentations: what they do to images and targets, and what their randomness depends on."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from mug.data.augment import Augment, AugmentConfig
from mug.data.errors import DataError

PLAIN = AugmentConfig(rand_augment=None, erase=0, mixup=0, cutmix=0, label_smoothing=0)


def views(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 3, 16, 16), dtype=np.uint8))


def test_mixup_mixes_images_and_targets_by_the_same_share():
    augment = Augment(AugmentConfig(rand_augment=None, erase=0, mixup=0.8, cutmix=0, label_smoothing=0.1), 16, 4)
    given, labels = views(4), [0, 1, 2, 3]
    shares = []
    for draw in range(5):
        image, target = augment.batch(given, labels, draw)
        share = (target[0, 0] - 0.025) / 0.9  # smoothing leaves 0.9 + 0.1 / 4 to the true class
        assert torch.allclose(target.sum(1), torch.ones(4))
        assert target[0, 3].item() == pytest.approx(0.9 * (1 - share.item()) + 0.025, abs=1e-6)
        expected = share.item() * given[0].astype(float) + (1 - share.item()) * given[3]
        assert image.dtype == torch.uint8 and np.abs(image[0].numpy() - expected).max() < 0.51
        shares.append(share.item())
    assert len(set(shares)) == 5 and all(0 <= share <= 1 for share in shares)


def test_cutmix_pastes_the_share_that_the_target_says():
    augment = Augment(AugmentConfig(rand_augment=None, erase=0, mixup=0, cutmix=1.0, label_smoothing=0), 16, 4)
    given = views(4)
    for draw in range(5):
        image, target = augment.batch(given, [0, 1, 2, 3], draw)
        own = (image[0].numpy() == given[0]).all(0)
        other = (image[0].numpy() == given[3]).all(0)
        assert (own | other).all()
        assert own.mean() == pytest.approx(target[0, 0].item(), abs=0.02)


def test_without_mixing_images_pass_unchanged():
    image, target = Augment(PLAIN, 16, 3).batch(views(2), [2, 0], draw=1)
    assert np.array_equal(image.numpy(), np.stack(views(2)))
    assert target.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_mixing_needs_an_even_number_of_images():
    with pytest.raises(DataError, match=r"trainer\.micro_batch is 3: mixing pairs images; give an even number"):
        Augment(AugmentConfig(), 16, 3).batch(views(3), [2, 0, 1], draw=1)


def test_without_mixing_a_batch_may_be_odd_and_targets_are_smoothed():
    smoothed = dataclasses.replace(PLAIN, label_smoothing=0.3)
    image, target = Augment(smoothed, 16, 3).batch(views(3), [2, 0, 1], draw=1)
    assert np.array_equal(image.numpy(), np.stack(views(3)))
    torch.testing.assert_close(target, torch.tensor([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]))


def test_an_augmented_view_depends_on_its_draw_alone_and_moves_no_other_randomness():
    augment, view = Augment(AugmentConfig(), 16, 3), views(1)[0]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = [augment.view(view, draw) for draw in range(20)]
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    random.seed(4), np.random.seed(4), torch.manual_seed(4)
    again = [augment.view(view, draw) for draw in range(20)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(one.dtype == np.uint8 and one.shape == view.shape for one in first)
    assert len({one.tobytes() for one in first}) > 10, "most draws change it, each in its own way"


def test_random_erasing_replaces_a_rectangle():
    augment = Augment(AugmentConfig(rand_augment=None, erase=0.99, mixup=0, cutmix=0), 16, 3)
    view = np.full((3, 16, 16), 200, np.uint8)
    changed = (augment.view(view, draw=0) != view).any(0)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert 0.02 < changed.mean() < 0.4
    assert len(rows) * len(columns) == pytest.approx(changed.sum(), rel=0.05), "all of a rectangle, and no more"


def test_a_policy_that_timm_does_not_know_is_named():
    with pytest.raises(DataError, match=r"augment.rand_augment auto is not a timm policy"):
        Augment(AugmentConfig(rand_augment="auto"), 16, 3)
