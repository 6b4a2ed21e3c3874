"""Fixed sine-cosine positions (MAE, arXiv 2111.06377, appendix A.1). Recomputed, never stored."""

import torch
from torch import Tensor


def sincos_1d(width: int, place_N: Tensor) -> Tensor:
    """fp64 [N, width]: sines, then cosines, of place / 10000^(2i/width)."""
    omega = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = place_N.double()[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_2d(width: int, grid: int) -> Tensor:
    """fp32 [grid², width] in raster order: the first half of the width codes the column, the second the row."""
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    halves = [sincos_1d(width // 2, axis.flatten()) for axis in (column, row)]
    return torch.cat(halves, dim=1).float()
