"""The text decoder: uni-modal layers, then layers that cross-attend to the encoder's output (CoCa's shape).

Dimension letters: B batch, T tokens, L encoded image tokens, D width, H heads, V vocabulary.
"""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from mug.kernels.attention import attention
from mug.kernels.linear_cross_entropy import linear_cross_entropy
from mug.model.presets import ModelConfig, Vocabulary
from mug.model.vit import LayerNorm

Cache = dict[str, Tensor]  # keys and values of one layer, [B, tokens so far, H, D/H]


class TextSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, causal: bool, lengths_B: Tensor | None, cache: Cache | None) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(B, T, 3, self.heads, -1).unbind(2)  # [B, T, H, D/H]
        if cache is not None:  # T is 1: the new token sees all tokens so far
            k = cache["k"] = torch.cat([cache["k"], k], dim=1) if "k" in cache else k
            v = cache["v"] = torch.cat([cache["v"], v], dim=1) if "v" in cache else v
            causal = False
        return self.proj(attention(q, k, v, causal=causal, kv_lengths=lengths_B).reshape(B, T, -1))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int, memory_width: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, memory_BLD: Tensor, cache: Cache | None) -> Tensor:
        B, T, _ = x_BTD.shape
        q = self.q(x_BTD).view(B, T, self.heads, -1)
        if cache is not None and "memory_k" in cache:
            k, v = cache["memory_k"], cache["memory_v"]
        else:
            k, v = self.kv(memory_BLD).view(B, memory_BLD.shape[1], 2, self.heads, -1).unbind(2)
        if cache is not None:
            cache["memory_k"], cache["memory_v"] = k, v
        return self.proj(attention(q, k, v).reshape(B, T, -1))


class TextBlock(nn.Module):
    """Pre-norm block; cross-attends to the image between self-attention and MLP if `memory_width` is given."""

    def __init__(self, width: int, heads: int, memory_width: int | None = None):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = TextSelfAttention(width, heads)
        if memory_width is not None:
            self.norm_cross = LayerNorm(width)
            self.cross_attn = CrossAttention(width, heads, memory_width)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)
        self.cross = memory_width is not None

    def forward(
        self,
        x_BTD: Tensor,
        memory_BLD: Tensor,
        causal: bool,
        lengths_B: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        x = x_BTD + self.attn(self.norm1(x_BTD), causal, lengths_B, cache)
        if self.cross:
            x = x + self.cross_attn(self.norm_cross(x), memory_BLD, cache)
        return x + self.mlp(self.norm2(x))


class CaptionHead(nn.Module):
    """Owns the vocabulary matrix, so that ZeRO-3 gathers it in this module's own forward."""

    def __init__(self, width: int, vocabulary: Vocabulary):
        super().__init__()
        self.pad = vocabulary.pad
        self.weight = nn.Parameter(torch.empty(vocabulary.size, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, hidden_BTD: Tensor, target_BT: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(loss, accuracy) over the targets that are not PAD; without targets, logits [B, T, V]."""
        if target_BT is None:
            return nn.functional.linear(hidden_BTD, self.weight)
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), self.weight, target_BT.flatten(), ignore_index=self.pad)


class TextDecoder(nn.Module):
    def __init__(self, config: ModelConfig, vocabulary: Vocabulary):
        super().__init__()
        width, heads = config.text_width, config.text_heads
        self.embed = nn.Embedding(vocabulary.size, width)
        self.position_embed = nn.Parameter(torch.empty(config.text_length, width))
        nn.init.normal_(self.position_embed, std=0.02)
        unimodal = [TextBlock(width, heads) for _ in range(config.text_unimodal_layers)]
        cross = [TextBlock(width, heads, config.width) for _ in range(config.text_cross_layers)]
        self.blocks = nn.ModuleList([*unimodal, *cross])
        self.norm = LayerNorm(width)
        self.head = CaptionHead(width, vocabulary)
        if config.tied_head:
            self.embed.weight = self.head.weight

    def forward(
        self,
        tokens_BT: Tensor,
        memory_BLD: Tensor,
        *,
        causal: bool = True,
        lengths_B: Tensor | None = None,
        caches: list[Cache] | None = None,
    ) -> Tensor:
        """Hidden states, before the head.

        Args:
            tokens_BT: int64 [B, T]; with `caches`, the one newest token, [B, 1].
            memory_BLD: [B, L, encoder width], the encoder's output.
            causal: token t sees tokens 0..t alone.
            lengths_B: int [B], tokens from there on are padding (needed where `causal` is off).
            caches: one dict a layer, filled and grown here.

        Returns:
            [B, T, D], normalised.

        Raises:
            ValueError: more tokens than the model's text length.
        """
        start = caches[0]["k"].shape[1] if caches and "k" in caches[0] else 0
        if start + tokens_BT.shape[1] > len(self.position_embed):
            raise ValueError(f"{start + tokens_BT.shape[1]} tokens, the model takes {len(self.position_embed)}")
        positions_TD = self.position_embed[start : start + tokens_BT.shape[1]]
        x = self.embed(tokens_BT) + positions_TD  # [B, T, D]
        for layer, block in enumerate(self.blocks):
            x = block(x, memory_BLD, causal, lengths_B, None if caches is None else caches[layer])
        return self.norm(x)
