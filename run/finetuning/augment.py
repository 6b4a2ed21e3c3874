"""timm's augmentations of views and of batches, made functions of the draw that they are given.

Dimension letters: B batch, S side of a view, C classes.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import FastCollateMixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from mug.model.encoder import PIXEL_MEAN, PIXEL_STD
from mug.run.finetuning.recipe import AugmentConfig
from mug.run.training.errors import RunError

MEAN_C11, STD_C11 = (np.array(values, np.float32)[:, None, None] * 255 for values in (PIXEL_MEAN, PIXEL_STD))


@contextlib.contextmanager
def seeded(draw: int) -> Iterator[None]:
    """timm draws from the generators of Python, NumPy and torch: inside, all begin at `draw`; then they go on."""
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
        self.policy = _policy(config.rand_augment, size) if config.rand_augment else None
        self.erase = RandomErasing(config.erase, mode="pixel", device="cpu") if config.erase else None
        self.classes, self.smoothing = classes, config.label_smoothing
        self.mixer = None
        if config.mixup or config.cutmix:
            self.mixer = FastCollateMixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes
            )

    def view(self, view_CSS: np.ndarray, draw: int) -> np.ndarray:
        """Another uint8 [3, S, S], a function of the arguments alone."""
        with seeded(draw):
            if self.policy:
                changed = self.policy(Image.fromarray(np.ascontiguousarray(view_CSS.transpose(1, 2, 0))))
                view_CSS = np.asarray(changed).transpose(2, 0, 1)
            if self.erase:
                view_CSS = self._erased(view_CSS)
        return np.ascontiguousarray(view_CSS)

    def _erased(self, view_CSS: np.ndarray) -> np.ndarray:
        """Noise is normal in the encoder's units: it is erased there, and comes back to the nearest grey level."""
        normal_CSS = torch.from_numpy((view_CSS - MEAN_C11) / STD_C11)
        erased_CSS = self.erase(normal_CSS).numpy() * STD_C11 + MEAN_C11
        return erased_CSS.round().clip(0, 255).astype(np.uint8)

    def batch(self, views: list[np.ndarray], labels: list[int], draw: int) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, S, S] and fp32 targets [B, C]: each view mixed, or not, with the one as far from the end."""
        if self.mixer is None:
            target_BC = mixup_target(torch.tensor(labels), self.classes, smoothing=self.smoothing)
            return torch.from_numpy(np.stack(views)), target_BC
        with seeded(draw):
            image_BCSS, target_BC = self.mixer(list(zip(views, labels, strict=True)))
        return image_BCSS, target_BC


def _policy(name: str, size: int):
    """timm's transform; what rotates or shifts in from outside is of the mean colour."""
    colours = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * mean)) for mean in PIXEL_MEAN),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        return rand_augment_transform(name, colours)
    except (AssertionError, ValueError) as error:
        raise RunError(f"augment.rand_augment {name} is no policy of timm's, as rand-m9-mstd0.5-inc1 is") from error
