"""Attention pooling: learned queries read a sequence (CoCa, arXiv 2205.01917, section 3.2).

Dimension letters: B batch, L states to read, Q queries, D width.
"""

import torch
from torch import Tensor, nn

from mug.model.text_decoder import CrossAttention
from mug.model.vit import LayerNorm


class AttentionPooler(nn.Module):
    """Returns [B, Q, D], normalised, of normalised states [B, L, D]."""

    def __init__(self, queries: int, width: int, heads: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, width))
        nn.init.normal_(self.queries, std=0.02)
        self.norm_queries = LayerNorm(width)
        self.attn = CrossAttention(width, heads, width)
        self.norm = LayerNorm(width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        queries_BQD = self.queries.expand(len(x_BLD), -1, -1)
        return self.norm(self.attn(queries_BQD, self.norm_queries, x_BLD, None, None))
