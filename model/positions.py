"""Fixed sine-cosine positions (MAE, arXiv 2111.06377, appendix A.1), recomputed, never stored; tables for other grids.

Dimension letters: N patches, D width, g patches along a side.
"""

import torch
from torch import Tensor, nn


def sincos_1d(width: int, place_N: Tensor) -> Tensor:
    """Returns fp64 [N, width]: sines, then cosines, of place / 10000^(2i/width)."""
    omega = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = place_N.double()[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_2d(width: int, grid: int) -> Tensor:
    """Returns fp32 [grid², width] in raster order: the first half of the width codes the column, the second the row."""
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    halves = [sincos_1d(width // 2, axis.flatten()) for axis in (column, row)]
    return torch.cat(halves, dim=1).float()


def interpolate_pos_embed(positions_ND: Tensor, grid: int) -> Tensor:
    """Returns [grid², D]: positions of a square image, interpolated (bicubic) to another grid, as in MAE's code."""
    own = round(len(positions_ND) ** 0.5)
    if own == grid:
        return positions_ND
    table_1Dgg = positions_ND.T.unflatten(1, (own, own))[None]
    stretched_1Dgg = nn.functional.interpolate(table_1Dgg, size=(grid, grid), mode="bicubic")
    return stretched_1Dgg.flatten(2)[0].T
