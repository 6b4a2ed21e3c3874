"""The text decoder: uni-modal layers, then layers that cross-attend to the encoder's output (CoCa's shape).

Padding costs nothing: captions are packed end to end before the first layer, and stay so up to their loss.

Dimension letters: B batch, T tokens, L encoded image tokens, R tokens of all captions packed, D width, H heads,
V vocabulary. x stands for [B, T, D], or packed [R, D].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mug.kernels.attention import attention, attention_kv, attention_qkv
from mug.kernels.linear_cross_entropy import linear_cross_entropy
from mug.model.activation_checkpointing import checkpointed, recomputing_linear
from mug.model.presets import TextDecoderConfig, Vocabulary
from mug.model.vit import NORM_EPS, LayerNorm, Mlp

# Of one layer: keys `k` and values `v`, [B, tokens so far, H, D/H], those of the image, and where the images are padded
# their lengths, int64 [B].
Cache = dict[str, Tensor]
MEMORY_LENGTHS = "memory_lengths"


class Packing(NamedTuple):
    """Captions laid end to end without their padding.

    Args:
        row_R: int64 [R], the place of each packed token among the B·T.
        starts: int32 [B + 1], where each caption begins, and at last R.
        memory_starts: int32 [B + 1], the same of the image tokens.
        longest: no caption has more tokens.
        longest_memory: no image has more tokens.
    """

    row_R: Tensor
    starts: Tensor
    memory_starts: Tensor
    longest: int
    longest_memory: int


def packed_rows(lengths_B: Tensor, T: int) -> Tensor:
    """Returns int64 [R], the places among B·T of the tokens of captions of these lengths; the host waits for a GPU."""
    return (torch.arange(T, device=lengths_B.device) < _at_least_one(lengths_B)[:, None]).flatten().nonzero().squeeze(1)


def _at_least_one(lengths_B: Tensor) -> Tensor:
    """Returns the lengths, at least 1: one token of a sample without caption, too, so that no call is empty."""
    return lengths_B.clamp(min=1)


def pack(lengths_B: Tensor, T: int, L: int, row_R: Tensor | None = None) -> Packing:
    """Returns the packing of captions of these lengths, for images of L tokens each; `row_R` as of `packed_rows`."""
    row_R = packed_rows(lengths_B, T) if row_R is None else row_R
    starts = nn.functional.pad(_at_least_one(lengths_B).cumsum(0), (1, 0)).int()
    memory_starts = L * torch.arange(len(lengths_B) + 1, device=lengths_B.device, dtype=torch.int32)
    return Packing(row_R, starts, memory_starts, T, L)


def embed_words(
    embed: Callable[[Tensor], Tensor],
    position_embed_TD: Tensor,
    tokens_BT: Tensor,
    packing: Packing | None,
    start: int = 0,
) -> Tensor:
    """Returns the embeddings [B, T, D], or packed [R, D], of words whose first stands at `start`, with positions.

    Raises:
        ValueError: more tokens than there are positions.
    """
    T = tokens_BT.shape[1]
    if start + T > len(position_embed_TD):
        raise ValueError(f"{start + T} tokens, the model takes {len(position_embed_TD)}")
    positions_TD = position_embed_TD[start : start + T]
    if packing is None:
        return embed(tokens_BT) + positions_TD
    # Not positions_TD[row_R % T], whose gradient adds token after token into T rows.
    return embed(tokens_BT.flatten()[packing.row_R]) + nn.functional.embedding(packing.row_R % T, positions_TD)


class TextSelfAttention(nn.Module):
    """Returns self-attention of the normalised x."""

    activation_checkpointing = "none"

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, norm: nn.Module, causal: bool, packing: Packing | None, cache: Cache | None) -> Tensor:
        qkv = recomputing_linear(norm, self.qkv, self.activation_checkpointing, x)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # [B, T, 3, H, D/H] or [R, 3, H, D/H]
        if cache is None:
            sequences: dict[str, Any] = (
                {} if packing is None else {"cu_seqlens": packing.starts, "max_seqlen": packing.longest}
            )
            return self.proj(attention_qkv(qkv, causal=causal, **sequences).flatten(-2))
        q, k, v = qkv.unbind(-3)
        causal = causal and "k" not in cache  # later T is 1: the new token sees all tokens so far
        k = cache["k"] = torch.cat([cache["k"], k], dim=1) if "k" in cache else k
        v = cache["v"] = torch.cat([cache["v"], v], dim=1) if "v" in cache else v
        return self.proj(attention(q, k, v, causal=causal).flatten(-2))


class CrossAttention(nn.Module):
    """Returns cross-attention of the normalised x to the image."""

    activation_checkpointing = "none"

    def __init__(self, width: int, heads: int, memory_width: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, norm: nn.Module, memory_BLD: Tensor, packing: Packing | None, cache: Cache | None
    ) -> Tensor:
        q = recomputing_linear(norm, self.q, self.activation_checkpointing, x).unflatten(-1, (self.heads, -1))
        if cache is not None and "memory_kv" in cache:
            kv = cache["memory_kv"]
        else:
            kv = self.kv(memory_BLD).unflatten(-1, (2, self.heads, -1))  # [B, L, 2, H, D/H]
        if cache is not None:
            cache["memory_kv"] = kv
        if packing is None:
            lengths_B = None if cache is None else cache.get(MEMORY_LENGTHS)
            return self.proj(attention_kv(q, kv, kv_lengths=lengths_B).flatten(-2))
        starts = {"cu_seqlens_q": packing.starts, "cu_seqlens_k": packing.memory_starts}
        longest = {"max_seqlen_q": packing.longest, "max_seqlen_k": packing.longest_memory}
        kv = kv.reshape(-1, *kv.shape[-3:])  # of images of one size, or packed as it is
        return self.proj(attention_kv(q, kv, **starts, **longest).flatten(-2))


class TextBlock(nn.Module):
    """Pre-norm block; cross-attends to the image between self-attention and MLP if `memory_width` is given."""

    activation_checkpointing = "none"
    ragged = True  # x has as many rows as the captions have tokens

    def __init__(self, width: int, heads: int, memory_width: int | None = None, norm_eps: float = NORM_EPS):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = TextSelfAttention(width, heads)
        if memory_width is not None:
            self.norm_cross = nn.LayerNorm(width, eps=norm_eps)
            self.cross_attn = CrossAttention(width, heads, memory_width)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
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
        return checkpointed(self._layers, self.activation_checkpointing, x, memory_BLD, causal, packing, cache)

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

    def forward(
        self, hidden: Tensor, target_R: Tensor | None = None, kept_K: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns (loss, accuracy) of packed states [R, D] over targets other than PAD; without them, logits [.., V].

        `kept_K`, int64: the rows of these targets; without them, the host waits for a GPU.
        """
        if target_R is None:
            return nn.functional.linear(hidden, self.weight)
        return linear_cross_entropy(hidden, self.weight, target_R, ignore_index=self.pad, kept_K=kept_K)


class TextDecoder(nn.Module):
    def __init__(self, config: TextDecoderConfig, vocabulary: Vocabulary):
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
        packing: Packing | None = None,
        caches: list[Cache] | None = None,
    ) -> Tensor:
        """Returns hidden states, before the head.

        Args:
            tokens_BT: int64 [B, T]; with `caches`, the one newest token, [B, 1].
            memory_BLD: [B, L, encoder width], the encoder's output.
            causal: token t sees only tokens 0..t.
            packing: of `pack`, the tokens that are not padding: no layer sees the others. None: all T tokens count.
            caches: one dict a layer, filled and grown here.

        Returns:
            [B, T, D], or packed [R, D]; normalised.

        Raises:
            ValueError: more tokens than the model's text length.
        """
        start = caches[0]["k"].shape[1] if caches and "k" in caches[0] else 0
        x = embed_words(self.embed, self.position_embed, tokens_BT, packing, start)
        for layer, block in enumerate(self.blocks):
            x = block(x, memory_BLD, causal, packing, None if caches is None else caches[layer])
        return self.norm(x)
