"""The ViT block that encoder and pixel decoder share: timm's, by its parameter names, with attention from mug.kernels.

Dimension letters: B batch, N tokens, D width, H heads.
"""

from functools import partial

import torch
from torch import Tensor, nn

from mug.kernels.attention import attention_qkv
from mug.model.activation_checkpointing import checkpointed, recomputing_linear

NORM_EPS = 1e-6  # MAE's and timm's
LayerNorm = partial(nn.LayerNorm, eps=NORM_EPS)


class SelfAttention(nn.Module):
    """Multi-head attention of the normalised x to itself, by the project's kernel: floating [B, N, D] to [B, N, D]."""

    activation_checkpointing = "none"

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, norm: nn.Module, keys_B: Tensor | None = None, causal: bool = False) -> Tensor:
        B, N, _ = x_BND.shape
        qkv = recomputing_linear(norm, self.qkv, self.activation_checkpointing, x_BND).view(B, N, 3, self.num_heads, -1)
        if keys_B is None or not causal:
            return self.proj(attention_qkv(qkv, causal=causal, kv_lengths=keys_B).reshape(B, N, -1))
        # Each query sees either the prefix or all keys up to its own: the kernels have masks for both.
        prefix = attention_qkv(qkv, kv_lengths=keys_B)
        within_BN = torch.arange(N, device=x_BND.device) < keys_B[:, None]
        return self.proj(prefix.where(within_BN[..., None, None], attention_qkv(qkv, causal=True)).reshape(B, N, -1))


class Mlp(nn.Module):
    """Two layers with GELU, of the normalised x, floating [..., D]; returns the same shape."""

    activation_checkpointing = "none"

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        hidden = recomputing_linear(norm, self.fc1, self.activation_checkpointing, x)
        return recomputing_linear(self.act, self.fc2, self.activation_checkpointing, hidden)


class Block(nn.Module):
    """A pre-norm ViT block, MLP of 4 x width; stochastic depth where it is added."""

    activation_checkpointing = "none"
    ragged = False  # x has the same shape in all steps

    def __init__(self, width: int, heads: int, norm_eps: float = NORM_EPS):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, norm_eps)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, norm_eps)
        self.mlp = Mlp(width, 4 * width)
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, x_BND: Tensor, keys_B: Tensor | None = None, causal: bool = False) -> Tensor:
        """Returns [B, N, D]. A query sees the first `keys_B` keys, int [B], or all; if `causal`, those up to its own,
        and with both the union: a prefix seen by all, and what follows it from left to right."""
        return checkpointed(self._layers, self.activation_checkpointing, x_BND, keys_B, causal)

    def _layers(self, x_BND: Tensor, keys_B: Tensor | None, causal: bool) -> Tensor:
        x_BND = x_BND + self.drop_path1(self.attn(x_BND, self.norm1, keys_B, causal))
        return x_BND + self.drop_path2(self.mlp(x_BND, self.norm2))


def init_weights(module: nn.Module) -> None:
    """Initialise as MAE: Xavier-uniform linear layers, zero biases; normal(0.02) embeddings."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
