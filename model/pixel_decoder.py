"""MAE's pixel decoder (arXiv 2111.06377, section 3): from encoded visible patches to the masked ones.

Dimension letters: B batch, N patches, K visible, M masked, P values of a patch, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mug.kernels.masked_patch_loss import masked_patch_loss
from mug.model.encoder import PIXEL_MEAN, PIXEL_STD
from mug.model.positions import sincos_2d
from mug.model.presets import PixelDecoderConfig
from mug.model.vit import Block, LayerNorm


class PixelDecoder(nn.Module):
    def __init__(self, config: PixelDecoderConfig):
        super().__init__()
        self.config, width = config, config.pixel_width
        self.embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("positions_ND", sincos_2d(width, config.grid), persistent=False)
        self.blocks = nn.ModuleList(Block(width, config.pixel_heads) for _ in range(config.pixel_depth))
        self.norm = LayerNorm(width)
        self.pred = nn.Linear(width, config.patch_values)

    def forward(self, encoded_BLD: Tensor, visible_BK: Tensor, masked_BM: Tensor) -> Tensor:
        """Predict the masked patches.

        Args:
            encoded_BLD: [B, 1 + K, encoder width], class token first.
            visible_BK, masked_BM: int64 raster indices of the patches.

        Returns:
            [B, M, P], in the order of `masked_BM`; values of a patch ordered (row, column, channel).
        """
        x = self.embed(encoded_BLD)  # [B, 1 + K, D]
        # Attention does not depend on the order of its tokens: the masked ones simply follow the visible ones.
        dtype = self.mask_token.dtype  # a bf16 model keeps its buffers in fp32
        visible = (x[:, 1:] + self.positions_ND[visible_BK]).to(dtype)
        masked = (self.mask_token + self.positions_ND[masked_BM]).to(dtype)
        x = torch.cat([x[:, :1], visible, masked], dim=1)  # [B, 1 + N, D]
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x[:, -masked_BM.shape[1] :]))  # [B, M, P]

    def loss(self, image_BCHW: Tensor, encoded_BLD: Tensor, visible_BK: Tensor, masked_BM: Tensor) -> Tensor:
        """Returns the mean squared error of the masked patches of uint8 images [B, 3, H, W] (section 3)."""
        return patch_loss(self.config, image_BCHW, self(encoded_BLD, visible_BK, masked_BM), masked_BM)


def patch_loss(
    config: Any, image_BCHW: Tensor, prediction_BMP: Tensor, index_BM: Tensor, counts_B: Tensor | None = None
) -> Tensor:
    """Returns `masked_patch_loss` of predictions of ImageNet-normalised pixels, as `config` wants them."""
    return masked_patch_loss(
        image_BCHW,
        prediction_BMP,
        index_BM,
        patch_size=config.patch_size,
        mean=PIXEL_MEAN,
        std=PIXEL_STD,
        normalize_patches=config.normalize_patches,
        counts_B=counts_B,
    )
