"""Stochastic depth (arXiv 1603.09382), and how a pre-trained encoder is prepared to be trained end to end."""

from torch import Tensor, nn

from mug.model.encoder import Encoder
from mug.model.keyed_random import DROP_PATH, random_bits


class DropPath(nn.Module):
    """Drops a residual branch for some samples.

    `scale_B`, fp32 [B], is set before each forward pass in training: 0 for those, more than 1 for the others, so that
    the mean stays. None drops nothing.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.scale_B: Tensor | None = None

    def forward(self, x_BND: Tensor) -> Tensor:
        if not self.training or self.scale_B is None:
            return x_BND
        return x_BND * self.scale_B.to(x_BND.dtype)[:, None, None]


def prepare_for_finetuning(encoder: Encoder, drop_path: float) -> list[DropPath]:
    """Make a pre-trained encoder ready to be trained end to end: its positions become a parameter, and its blocks get
    stochastic depth, of a rate that rises linearly from 0 to `drop_path`; returns these modules."""
    encoder.learn_positions()
    drops = []
    for i, block in enumerate(encoder.blocks):
        rate = drop_path * i / max(len(encoder.blocks) - 1, 1)
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        drops += [block.drop_path1, block.drop_path2]
    return drops


def sample_drop_path(drops: list[DropPath], seed: int, position_B: Tensor) -> None:
    """Decide by (seed, position) which branches the next forward pass drops."""
    draws_BK = random_bits(seed, DROP_PATH, position_B, len(drops)).double() / 2.0**63
    for drop, draw_B in zip(drops, draws_BK.unbind(1), strict=True):
        drop.scale_B = (draw_B >= drop.rate).float() / (1 - drop.rate) if drop.rate else None
