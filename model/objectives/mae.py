"""MAE (arXiv 2111.06377): the encoder sees the visible patches, a decoder regresses the masked ones.

Dimension letters: B batch, K visible, M masked, P values of a patch, D width.
"""

from typing import ClassVar

from torch import Tensor

from mug.model import flops
from mug.model.encoder import Encoder
from mug.model.generate import paint
from mug.model.keyed_random import random_masking
from mug.model.objectives.objective import Batch, Context, Losses, Metrics, Objective
from mug.model.pixel_decoder import PixelDecoder
from mug.model.presets import PixelDecoderConfig
from mug.model.vit import Block, init_weights


class MAE(Objective):
    """Reads uint8 `image` [B, 3, H, W] and int64 `position` [B], which decides with the seed what is masked."""

    Config = PixelDecoderConfig
    losses: ClassVar = {"pixels": 1.0}
    zero3_leaves = (Block,)

    def __init__(self, config: PixelDecoderConfig, context: Context):
        super().__init__(config, context)
        self.encoder = Encoder(config)
        self.pixel_decoder = PixelDecoder(config)
        self.apply(init_weights)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Masked patches."""
        return {"pixels": len(batch["position"]) * (self.config.patches - self.config.visible)}

    def flops(self, batch: Batch) -> float:
        return len(batch["position"]) * (flops.encoder(self.config) + flops.pixel_decoder(self.config))

    def forward(self, batch: Batch) -> tuple[Losses, Metrics]:
        visible_BK, masked_BM = self.mask(batch["position"])
        encoded_BLD = self.encoder(batch["image"], visible_BK)  # [B, 1 + K, D]
        return {"pixels": self.pixel_decoder.loss(batch["image"], encoded_BLD, visible_BK, masked_BM)}, {}

    def mask(self, position_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the patches to see [B, K] and to predict [B, M], by (seed, position)."""
        return random_masking(self.context.seed, position_B, self.config.patches, self.config.visible)

    def reconstruct(self, image_BCHW: Tensor, position_B: Tensor) -> tuple[Tensor, Tensor]:
        visible_BK, masked_BM = self.mask(position_B)
        prediction_BMP = self.pixel_decoder(self.encoder(image_BCHW, visible_BK), visible_BK, masked_BM)
        return paint(self.config, image_BCHW, masked_BM, prediction_BMP)
