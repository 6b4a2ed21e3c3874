"""I-JEPA (arXiv 2301.08243): from a part of the image, predict what the encoder's average makes of blocks of the rest.

Where the authors differ: they draw one block size for a batch, and cut all contexts of a batch to its shortest one;
here each sample has its own, by (seed, position), and a context has half of the patches at most. Their encoder has no
class token; here the predictor sees it. Dimension letters: B batch, N patches, g patches along a side, K patches of the
context at most, J blocks, M patches of a block at most, S = 1 + K + M, D width.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad, smooth_l1_loss

from mug.model import flops
from mug.model.encoder import Encoder
from mug.model.keyed_random import BLOCKS, CONTEXT, random_bits
from mug.model.momentum import teacher_of
from mug.model.objectives.objective import Batch, Context, Losses, Metrics, Objective
from mug.model.positions import sincos_2d
from mug.model.presets import FROM_PRESET, EncoderConfig, ModelConfigError, at_least, between_0_and_1, check_sincos
from mug.model.vit import Block, LayerNorm, init_weights

# Section 3: the blocks to predict, their share of the image and their height over width, and the context's share.
J = 4
TARGET_SCALE, TARGET_ASPECT, CONTEXT_SCALE = (0.15, 0.2), (0.75, 1.5), (0.85, 1.0)


@dataclass(frozen=True)
class IJEPAConfig(EncoderConfig):
    """Sizes of an encoder and of a predictor.

    Args:
        predictor_width: width of the predictor.
        predictor_depth: its blocks; they have as many heads as the encoder's.
        momentum: share of the average that a step keeps, at first; it rises linearly to 1.
    """

    predictor_width: int = FROM_PRESET
    predictor_depth: int = FROM_PRESET
    momentum: float = 0.996

    def check(self) -> None:
        super().check()
        at_least(self, 1, "predictor_width", "predictor_depth")
        if self.predictor_width % self.heads:
            width, heads = self.predictor_width, self.heads
            raise ModelConfigError(f"model.predictor_width {width} is not a multiple of model.heads {heads}")
        check_sincos(self, "predictor_")
        between_0_and_1(self, "momentum")
        if self.grid < 2:
            raise ModelConfigError("an image of one patch has no rest to predict: lower model.patch_size")

    @property
    def context_patches(self) -> int:
        """K, patches of the context at most."""
        return self.patches // 2

    @property
    def block_patches(self) -> int:
        """M, patches of a block at most: its sides are rounded."""
        side, aspect = math.sqrt(self.patches * TARGET_SCALE[1]), math.sqrt(TARGET_ASPECT[1])
        return int((side * aspect + 0.5) * (side / aspect + 0.5))


class Masks(NamedTuple):
    """What is seen, and what is predicted.

    context_BK: int64 [B, K], the patches of the context, of which the first `context_B`, int64 [B], count.
    target_BJM: int64 [B, J, M], the patches of the blocks, of which the first `target_B`, int64 [B], count.
    """

    context_BK: Tensor
    context_B: Tensor
    target_BJM: Tensor
    target_B: Tensor


class Predictor(nn.Module):
    positions_ND: Tensor

    def __init__(self, config: IJEPAConfig):
        super().__init__()
        width = config.predictor_width
        self.embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.register_buffer("positions_ND", sincos_2d(width, config.grid), persistent=False)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.predictor_depth))
        self.norm = LayerNorm(width)
        self.proj = nn.Linear(width, config.width)

    def forward(self, encoded_BLD: Tensor, masks: Masks) -> Tensor:
        """Returns [B, J, M, encoder width], predictions of the blocks' patches, each block by itself.

        encoded_BLD: [B, 1 + K, encoder width], class token first.
        """
        B, _, M = masks.target_BJM.shape
        x = self.embed(encoded_BLD)
        context = torch.cat([x[:, :1], x[:, 1:] + self.positions_ND[masks.context_BK]], dim=1)
        context = pad(context, (0, 0, 0, M)).repeat_interleave(J, dim=0)  # [B·J, S, D]
        known_B = (1 + masks.context_B).repeat_interleave(J)
        # A block's patches follow the context's last one, so that all padding is behind them.
        slot_BS = torch.arange(context.shape[1], device=x.device) - known_B[:, None]
        target_BS = masks.target_BJM.flatten(0, 1).gather(1, slot_BS.clamp(0, M - 1))
        masked = self.mask_token + self.positions_ND[target_BS]
        x = context.where(slot_BS[..., None] < 0, masked).to(self.mask_token.dtype)  # positions are fp32
        for block in self.blocks:
            x = block(x, known_B + masks.target_B.repeat_interleave(J))
        index_BM = known_B[:, None] + torch.arange(M, device=x.device)
        x = x.gather(1, index_BM[..., None].expand(-1, -1, x.shape[-1]))
        return self.proj(self.norm(x)).unflatten(0, (B, J))


class IJEPA(Objective):
    """Reads uint8 `image` [B, 3, H, W] and int64 `position` [B], which decides with the seed what is masked.

    `encoder`, which is evaluated, is the average of `context_encoder`, which is trained.
    """

    Config = IJEPAConfig
    losses: ClassVar = {"latents": 1.0}
    zero3_leaves = (Block,)
    teachers: ClassVar = {"encoder": "context_encoder"}

    def __init__(self, config: IJEPAConfig, context: Context):
        super().__init__(config, context)
        self.context_encoder = Encoder(config)
        self.predictor = Predictor(config)
        self.apply(init_weights)
        self.encoder = cast(Encoder, teacher_of(self.context_encoder))

    def adopt(self, encoder: Encoder) -> None:
        super().adopt(encoder)
        self.context_encoder.load_state_dict(encoder.state_dict())

    def momentum_at(self, progress: float) -> float:
        return self.config.momentum + (1 - self.config.momentum) * progress

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of patches to predict; one that is in two blocks counts twice."""
        return {"latents": J * int(self.masks(batch["position"]).target_B.sum())}

    def flops(self, batch: Batch) -> float:
        """Returns FLOP without padding; of the average, the forward pass alone."""
        config, masks = self.config, self.masks(batch["position"])
        seen_B = 1 + masks.context_B
        seen, patches = float(seen_B.sum()), float(masks.context_B.sum())
        total = flops.linear(patches, config.patch_values, config.width)
        total += flops.blocks(config.width, config.depth, seen, float(seen_B.square().sum()))
        total += len(seen_B) * flops.encoder(config) / 3
        all_B, width = seen_B + masks.target_B, config.predictor_width
        tokens, pairs = J * float(all_B.sum()), J * float(all_B.square().sum())
        total += flops.linear(seen, config.width, width) + flops.blocks(width, config.predictor_depth, tokens, pairs)
        return total + flops.linear(J * float(masks.target_B.sum()), width, config.width)

    def forward(self, batch: Batch) -> tuple[Losses, Metrics]:
        masks = self.masks(batch["position"])
        encoded_BLD = self.context_encoder(batch["image"], masks.context_BK, keys_B=1 + masks.context_B)
        with torch.no_grad():
            patch_BND = self.encoder(batch["image"])[:, 1:].float()
            patch_BND = layer_norm(patch_BND, patch_BND.shape[-1:])
            index_BR = masks.target_BJM.flatten(1)[..., None].expand(-1, -1, patch_BND.shape[-1])
            target_BJMD = patch_BND.gather(1, index_BR).unflatten(1, masks.target_BJM.shape[1:])
        predicted_BJMD = self.predictor(encoded_BLD, masks).float()
        error_BJM = smooth_l1_loss(predicted_BJMD, target_BJMD, reduction="none").mean(-1)
        slot_M = torch.arange(error_BJM.shape[-1], device=error_BJM.device)
        error_BJM = error_BJM.masked_fill(slot_M >= masks.target_B[:, None, None], 0.0)
        # How far an image's targets differ: 0 where the encoder has collapsed.
        std = (patch_BND.std(1).mean(1) * masks.target_B).sum() / masks.target_B.sum()
        return {"latents": error_BJM.sum() / (J * masks.target_B.sum())}, {"std/latents": std}

    def masks(self, position_B: Tensor) -> Masks:
        """Returns the context and the blocks to predict, by (seed, position) (section 3)."""
        config, M = self.config, self.config.block_patches
        draw = random_bits(self.context.seed, BLOCKS, position_B, 5 + 2 * J).double()[..., None] / 2.0**63
        scale_B1, aspect_B1 = _between(draw[:, 0], TARGET_SCALE), _between(draw[:, 1], TARGET_ASPECT)
        height_B1 = (config.patches * scale_B1 * aspect_B1).sqrt().round().clamp(max=config.grid)
        width_B1 = (config.patches * scale_B1 / aspect_B1).sqrt().round().clamp(max=config.grid)
        slot_M, target_B = torch.arange(M, device=position_B.device), (height_B1 * width_B1).long()[:, 0]
        slot_BM = slot_M.where(slot_M < target_B[:, None], 0)
        row_BJM = _corner(draw[:, 5 : 5 + J, 0], height_B1, config.grid)[..., None] + (slot_BM // width_B1)[:, None]
        column_BJM = _corner(draw[:, 5 + J :, 0], width_B1, config.grid)[..., None] + (slot_BM % width_B1)[:, None]
        target_BJM = (row_BJM * config.grid + column_BJM).long()
        # The context's block, less the patches to predict.
        side_B1 = (config.patches * _between(draw[:, 2], CONTEXT_SCALE)).sqrt().round().clamp(max=config.grid)
        place_N = torch.arange(config.patches, device=position_B.device)
        inside_BN = torch.ones_like(side_B1 * place_N, dtype=torch.bool).scatter(1, target_BJM.flatten(1), False)
        for axis_N, u_B1 in ((place_N // config.grid, draw[:, 3]), (place_N % config.grid, draw[:, 4])):
            first_B1 = _corner(u_B1, side_B1, config.grid)
            inside_BN &= (axis_N >= first_B1) & (axis_N < first_B1 + side_B1)
        order_BN = random_bits(self.context.seed, CONTEXT, position_B, config.patches)
        order_BN = order_BN.masked_fill(~inside_BN, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        context_B = inside_BN.sum(1).clamp(max=config.context_patches)
        return Masks(order_BN[:, : config.context_patches], context_B, target_BJM, target_B)


def _between(u: Tensor, ends: tuple[float, float]) -> Tensor:
    """Returns u, uniform from 0 to 1, stretched to these ends."""
    return ends[0] + u * (ends[1] - ends[0])


def _corner(u: Tensor, size: Tensor, grid: int) -> Tensor:
    """Returns where along an axis a block of this size begins, uniform over all places where it fits."""
    return (u * (grid - size + 1)).floor().minimum(grid - size)
