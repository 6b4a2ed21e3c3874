"""timm's augmentations of views and of batches, made functions of the draw that they are given.

timm is imported where it is used: it takes seconds, and evaluations augment nothing.

Dimension letters: B batch, S side of a view, C classes.
"""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mug.data.errors import DataError
from mug.data.pixels import PIXEL_MEAN, PIXEL_STD

MEAN_C11, STD_C11 = (np.array(values, np.float32)[:, None, None] * 255 for values in (PIXEL_MEAN, PIXEL_STD))


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentations of training images and their targets; MAE's settings.

    Args:
        rand_augment: timm's name of a RandAugment policy; null for none.
        erase: Share of the images of which a random rectangle is replaced by noise.
        mixup: Alpha of mixup's Beta distribution; 0 for none.
        cutmix: Alpha of CutMix's. With both, each batch is mixed in one of the two ways.
        label_smoothing: Weight that the target spreads evenly over all classes.
    """

    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1

    def __post_init__(self):
        for name in ("erase", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise DataError(f"data.augment.{name} must be at least 0 and less than 1, not {getattr(self, name)}")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise DataError(f"data.augment.{name} must be at least 0, not {getattr(self, name)}")


@contextlib.contextmanager
def seeded(draw: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch, which timm draws from, with `draw`; restore them at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(draw)
        np.random.seed(draw % 2**32)
        torch.random.default_generator.manual_seed(draw % 2**63)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class Augment:
    """RandAugment and random erasing of views; mixup, CutMix and smoothed targets of batches."""

    def __init__(self, config: AugmentConfig, size: int, classes: int):
        from timm.data.mixup import FastCollateMixup
        from timm.data.random_erasing import RandomErasing

        self.policy = _policy(config.rand_augment, size) if config.rand_augment else None
        self.erase = RandomErasing(config.erase, mode="pixel", device="cpu") if config.erase else None
        self.classes, self.smoothing = classes, config.label_smoothing
        self.mixer = None
        if config.mixup or config.cutmix:
            self.mixer = FastCollateMixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes
            )

    def view(self, view_CSS: np.ndarray, draw: int) -> np.ndarray:
        """Returns another uint8 [3, S, S], a function of the arguments only."""
        with seeded(draw):
            if self.policy:
                changed = self.policy(Image.fromarray(np.ascontiguousarray(view_CSS.transpose(1, 2, 0))))
                view_CSS = np.asarray(changed).transpose(2, 0, 1)
            if self.erase:
                view_CSS = self._erased(view_CSS)
        return np.ascontiguousarray(view_CSS)

    def _erased(self, view_CSS: np.ndarray) -> np.ndarray:
        """Noise is normal in the encoder's units: it is erased there, and comes back to the nearest grey level."""
        assert self.erase is not None
        normal_CSS = torch.from_numpy((view_CSS - MEAN_C11) / STD_C11)
        erased_CSS = self.erase(normal_CSS).numpy() * STD_C11 + MEAN_C11
        return erased_CSS.round().clip(0, 255).astype(np.uint8)

    def batch(self, views: list[np.ndarray], labels: list[int], draw: int) -> tuple[Tensor, Tensor]:
        """Returns uint8 [B, 3, S, S] and fp32 targets [B, C]: views mixed, or not, with those as far from the end."""
        from timm.data.mixup import mixup_target

        if self.mixer is None:
            target_BC = mixup_target(torch.tensor(labels), self.classes, smoothing=self.smoothing)
            return torch.from_numpy(np.stack(views)), target_BC
        if len(views) % 2:
            raise DataError(f"trainer.micro_batch is {len(views)}: mixing pairs images; give an even number")
        with seeded(draw):
            image_BCSS, target_BC = self.mixer(list(zip(views, labels, strict=True)))
        return image_BCSS, target_BC


def _policy(name: str, size: int):
    """Returns timm's transform; what rotates or shifts in from outside has the mean colour."""
    from timm.data.auto_augment import rand_augment_transform

    colours = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * mean)) for mean in PIXEL_MEAN),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        return rand_augment_transform(name, colours)
    except (AssertionError, ValueError) as error:
        raise DataError(f"augment.rand_augment {name} is not a timm policy (example: rand-m9-mstd0.5-inc1)") from error
