"""The text decoder: uni-modal layers, then layers that cross-attend to the encoder's output (CoCa's shape).

Padding costs nothing: captions are packed end to end before the first layer and unpacked after the last one.

Dimension letters: B batch, T tokens, L encoded image tokens, R tokens of all captions packed, D width, H heads,
V vocabulary. x stands for [B, T, D], or packed [R, D].
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mug.kernels.attention import attention
from mug.kernels.linear_cross_entropy import linear_cross_entropy
from mug.model.presets import ModelConfig, Vocabulary
from mug.model.recompute import linear_of, run_block
from mug.model.vit import LayerNorm, Mlp

Cache = dict[str, Tensor]  # keys and values of one layer, [B, tokens so far, H, D/H]


class Packing(NamedTuple):
    """Captions laid end to end without their padding.

    Args:
        row_R: int64 [R], the place of each packed token among the B·T.
        starts: int32 [B + 1], where each caption begins, and at last R.
        memory_starts: int32 [B + 1], the same of the image tokens.
        longest: no caption, and no image, has more tokens.
    """

    row_R: Tensor
    starts: Tensor
    memory_starts: Tensor
    longest: int


def pack(lengths_B: Tensor, T: int, L: int) -> Packing:
    """How captions of these lengths lie end to end, beside images of L tokens each; the host waits for R."""
    lengths_B = lengths_B.clamp(min=1)  # of a sample without caption too, so that no call is ever empty
    row_R = (torch.arange(T, device=lengths_B.device) < lengths_B[:, None]).flatten().nonzero().squeeze(1)
    starts = nn.functional.pad(lengths_B.cumsum(0), (1, 0)).int()
    memory_starts = L * torch.arange(len(lengths_B) + 1, device=lengths_B.device, dtype=torch.int32)
    return Packing(row_R, starts, memory_starts, max(T, L))


class TextSelfAttention(nn.Module):
    """Of the normalised x."""

    recompute = "nothing"

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, norm: nn.Module, causal: bool, packing: Packing | None, cache: Cache | None) -> Tensor:
        qkv = linear_of(norm, self.qkv, self.recompute, x)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(-3)  # [B, T, H, D/H] or [R, H, D/H]
        sequences = {}
        if packing is not None:
            starts = packing.starts
            sequences = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen": packing.longest}
        if cache is not None:  # T is 1: the new token sees all tokens so far
            k = cache["k"] = torch.cat([cache["k"], k], dim=1) if "k" in cache else k
            v = cache["v"] = torch.cat([cache["v"], v], dim=1) if "v" in cache else v
            causal = False
        return self.proj(attention(q, k, v, causal=causal, **sequences).flatten(-2))


class CrossAttention(nn.Module):
    """Of the normalised x, to the image."""

    recompute = "nothing"

    def __init__(self, width: int, heads: int, memory_width: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, norm: nn.Module, memory_BLD: Tensor, packing: Packing | None, cache: Cache | None
    ) -> Tensor:
        q = linear_of(norm, self.q, self.recompute, x).unflatten(-1, (self.heads, -1))
        if cache is not None and "memory_k" in cache:
            k, v = cache["memory_k"], cache["memory_v"]
        else:
            k, v = self.kv(memory_BLD).unflatten(-1, (2, self.heads, -1)).unbind(2)
        if cache is not None:
            cache["memory_k"], cache["memory_v"] = k, v
        if packing is None:
            return self.proj(attention(q, k, v).flatten(-2))
        starts = {"cu_seqlens_q": packing.starts, "cu_seqlens_k": packing.memory_starts}
        out = attention(q, k.flatten(0, 1), v.flatten(0, 1), max_seqlen=packing.longest, **starts)
        return self.proj(out.flatten(-2))


class TextBlock(nn.Module):
    """Pre-norm block; cross-attends to the image between self-attention and MLP if `memory_width` is given."""

    recompute = "nothing"

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
        x: Tensor,
        memory_BLD: Tensor,
        causal: bool,
        packing: Packing | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        return run_block(self._layers, self.recompute, x, memory_BLD, causal, packing, cache)

    def _layers(
        self, x: Tensor, memory_BLD: Tensor, causal: bool, packing: Packing | None, cache: Cache | None
    ) -> Tensor:
        x = x + self.attn(x, self.norm1, causal, packing, cache)
        if self.cross:
            x = x + self.cross_attn(x, self.norm_cross, memory_BLD, packing, cache)
        return x + self.mlp(x, self.norm2)


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
            lengths_B: int [B], tokens from there on are padding: no layer sees them, and their output is 0, except
                of the first one. None: all T tokens count.
            caches: one dict a layer, filled and grown here.

        Returns:
            [B, T, D], normalised.

        Raises:
            ValueError: more tokens than the model's text length.
        """
        (B, T), L = tokens_BT.shape, memory_BLD.shape[1]
        start = caches[0]["k"].shape[1] if caches and "k" in caches[0] else 0
        if start + T > len(self.position_embed):
            raise ValueError(f"{start + T} tokens, the model takes {len(self.position_embed)}")
        packing, tokens, positions = None, tokens_BT, self.position_embed[start : start + T]
        if lengths_B is not None:
            packing = pack(lengths_B, T, L)
            tokens, positions = tokens_BT.flatten()[packing.row_R], positions[packing.row_R % T]
        x = self.embed(tokens) + positions
        for layer, block in enumerate(self.blocks):
            x = block(x, memory_BLD, causal, packing, None if caches is None else caches[layer])
        x = self.norm(x)
        if packing is None:
            return x
        return x.new_zeros(B * T, x.shape[-1]).index_copy(0, packing.row_R, x).view(B, T, -1)
