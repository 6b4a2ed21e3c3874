"""FLIP (arXiv 2212.00794): CLIP whose image encoder sees a random half, or quarter, of the patches in training.

The paper takes the mean of the visible patches; here the class token serves, as in CLIP, so that only the masking
differs. Its unmasked tuning is `clip`, whose `init` may name the parts of a run.
"""

from dataclasses import dataclass

from torch import Tensor

from mug.model.keyed_random import random_masking
from mug.model.objectives.clip import CLIP, CLIPConfig
from mug.model.presets import MaskingConfig


@dataclass(frozen=True)
class FLIPConfig(CLIPConfig, MaskingConfig):
    """Sizes of two encoders and their joint space, and the share of patches that is masked."""

    mask_ratio: float = 0.5


class FLIP(CLIP):
    """Reads what CLIP reads, and int64 `position` [B], which decides with the seed what is masked."""

    Config = FLIPConfig

    def visible(self, position_B: Tensor) -> Tensor:
        return random_masking(self.context.seed, position_B, self.config.patches, self.config.visible)[0]
