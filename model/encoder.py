"""The vision encoder: a ViT that runs only on the visible patches.

Dimension letters: B batch, N patches, K visible patches, P values of a patch, D width.
Parameter names are timm's (`cls_token`, `patch_embed.proj`, `blocks.N.…`, `norm`), without a prefix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mug.kernels.masked_patch_loss import gather_patches, normalize_channels, patchify
from mug.model.positions import sincos_2d
from mug.model.presets import EncoderConfig
from mug.model.vit import NORM_EPS, Block

PIXEL_MEAN = (0.485, 0.456, 0.406)  # ImageNet's, as MAE and timm's MAE weights have them
PIXEL_STD = (0.229, 0.224, 0.225)


class PatchProjection(nn.Module):
    """timm's patch convolution (weight [D, 3, p, p]) applied to patches that are already cut out."""

    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight.view(width, -1))

    def forward(self, patches_BKP: Tensor) -> Tensor:
        weight_DP = self.weight.permute(0, 2, 3, 1).flatten(1)  # patches come as (row, column, channel)
        return nn.functional.linear(patches_BKP.to(weight_DP.dtype), weight_DP, self.bias)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(patch_size, width)

    def forward(self, image_BCHW: Tensor, visible_BK: Tensor | None) -> Tensor:
        if visible_BK is None:
            patches_BKP = patchify(image_BCHW, self.patch_size)
        else:
            patches_BKP = gather_patches(image_BCHW, visible_BK, self.patch_size)
        return self.proj(normalize_channels(patches_BKP, PIXEL_MEAN, PIXEL_STD))


class Encoder(nn.Module):
    """ViT with a class token and fixed 2-D sin-cos positions; `norm_eps` is that of its layer norms."""

    positions_ND: Tensor

    def __init__(self, config: EncoderConfig, norm_eps: float = NORM_EPS):
        super().__init__()
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        nn.init.normal_(self.cls_token, std=0.02)
        self.register_buffer("positions_ND", sincos_2d(config.width, config.grid), persistent=False)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, norm_eps) for _ in range(config.depth))
        self.norm: nn.Module = nn.LayerNorm(config.width, eps=norm_eps)

    def learn_positions(self) -> None:
        """Make the positions a parameter, as they are in the ViTs of others."""
        positions_ND = self.positions_ND.clone()
        del self.positions_ND
        self.positions_ND = nn.Parameter(positions_ND)

    def forward(
        self,
        image_BCHW: Tensor,
        visible_BK: Tensor | None = None,
        taps: Sequence[int] = (),
        *,
        words_BTD: Tensor | None = None,
        keys_B: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor | list[Tensor]:
        """Encode the visible patches, and words with them.

        Args:
            image_BCHW: uint8 [B, 3, H, W], or floating in 0..1.
            visible_BK: int64 [B, K], raster index of the patches to see; None sees all N in raster order.
            words_BTD: [B, T, D], further tokens, which follow the patches.
            keys_B, causal: which tokens see which, as of `Block`; None and False: all see all.
            taps: numbers of blocks whose outputs, not normalised, are returned instead of the last one's, in a list.

        Returns:
            [B, 1 + K, D]: class token, then the visible patches in the order of `visible_BK`, normalised; with words
            [B, 1 + K + T, D].

        Raises:
            ValueError: an image of another size than the model's.
        """
        x, tapped = self._embed(image_BCHW, visible_BK), []
        if words_BTD is not None:
            x = torch.cat([x, words_BTD.to(x.dtype)], dim=1)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, keys_B, causal)
            if number in taps:
                tapped.append(x)
        return tapped if taps else self.norm(x)

    def _embed(self, image_BCHW: Tensor, visible_BK: Tensor | None) -> Tensor:
        """Returns [B, 1 + K, D], the input of the first block; arguments as of `forward`."""
        self._check(image_BCHW)
        x = self.patch_embed(image_BCHW, visible_BK)  # [B, K, D]
        positions = self.positions_ND if visible_BK is None else self.positions_ND[visible_BK]
        x = (x + positions).to(self.cls_token.dtype)  # a bf16 model keeps its buffers in fp32
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)

    def _check(self, image_BCHW: Tensor) -> None:
        side = self.patch_embed.patch_size * round(len(self.positions_ND) ** 0.5)
        if image_BCHW.shape[1:] != (3, side, side):
            raise ValueError(f"image has shape {tuple(image_BCHW.shape)}, the model takes [B, 3, {side}, {side}]")
