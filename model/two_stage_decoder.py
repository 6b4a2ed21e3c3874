"""A text decoder in two stages (CoCa, arXiv 2205.01917, section 3.2): the first sees only text, and embeds it.

Captions are packed end to end. Dimension letters: B batch, T tokens, L image tokens, R tokens of all captions packed,
D width. x stands for [B, T, D], or packed [R, D].
"""

import torch
from torch import Tensor, nn

from mug.model.presets import TextDecoderConfig, Vocabulary
from mug.model.text_decoder import Cache, CaptionHead, Packing, TextBlock, embed_words
from mug.model.vit import LayerNorm


class UnimodalText(nn.Module):
    """Causal layers that see only text; a class token behind each caption reads all of it, and no word sees it."""

    def __init__(self, config: TextDecoderConfig, vocabulary: Vocabulary):
        super().__init__()
        width = config.text_width
        self.embed = nn.Embedding(vocabulary.size, width)
        self.position_embed = nn.Parameter(torch.empty(config.text_length, width))
        self.cls_token = nn.Parameter(torch.empty(1, width))
        for parameter in (self.position_embed, self.cls_token):
            nn.init.normal_(parameter, std=0.02)
        self.blocks = nn.ModuleList(TextBlock(width, config.text_heads) for _ in range(config.text_unimodal_layers))
        self.norm = LayerNorm(width)

    def forward(
        self, tokens_BT: Tensor, packing: Packing | None = None, caches: list[Cache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (states of the words, of the class tokens).

        Args:
            tokens_BT: int64 [B, T]; with `caches`, the one newest token, [B, 1].
            packing: of the captions: states of words are [R, D], of class tokens [B, D], normalised.
            caches: one dict a layer, filled and grown here, instead of `packing`; there is no class token then.

        Raises:
            ValueError: more tokens than the model's text length.
        """
        start = caches[0]["k"].shape[1] if caches and "k" in caches[0] else 0
        x = embed_words(self.embed, self.position_embed, tokens_BT, packing, start)
        if packing is None:
            for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
                x = block(x, None, True, None, cache)
            return x, None
        B, R, starts = len(tokens_BT), len(x), packing.starts
        longer = packing._replace(
            starts=starts + torch.arange(B + 1, device=x.device, dtype=starts.dtype), longest=packing.longest + 1
        )
        word_R = torch.arange(R, device=x.device) + packing.row_R // tokens_BT.shape[1]
        cls_B = longer.starts[1:].long() - 1
        x = x.new_zeros(R + B, x.shape[1]).index_copy(0, word_R, x)
        x = x.index_copy(0, cls_B, self.cls_token.expand(B, -1))
        for block in self.blocks:
            x = block(x, None, True, longer)
        return x.index_select(0, word_R), self.norm(x.index_select(0, cls_B))


class MultimodalText(nn.Module):
    """Causal layers that also attend to the image, and the head that predicts the next word."""

    def __init__(self, config: TextDecoderConfig, vocabulary: Vocabulary):
        super().__init__()
        width, layers = config.text_width, range(config.text_cross_layers)
        self.blocks = nn.ModuleList(TextBlock(width, config.text_heads, config.width) for _ in layers)
        self.norm = LayerNorm(width)
        self.head = CaptionHead(width, vocabulary)

    def forward(
        self, x: Tensor, memory_BLD: Tensor, packing: Packing | None = None, caches: list[Cache] | None = None
    ) -> Tensor:
        """Returns normalised states for the head, in the shape of x; arguments as of `UnimodalText`."""
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, memory_BLD, True, packing, cache)
        return self.norm(x)


class TwoStageDecoder(nn.Module):
    """Both stages; its forward is for writing captions (mug.model.generate)."""

    def __init__(self, config: TextDecoderConfig, vocabulary: Vocabulary):
        super().__init__()
        self.unimodal = UnimodalText(config, vocabulary)
        self.multimodal = MultimodalText(config, vocabulary)
        if config.tied_head:
            self.unimodal.embed.weight = self.multimodal.head.weight

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.unimodal.blocks, *self.multimodal.blocks]

    @property
    def position_embed(self) -> Tensor:
        return self.unimodal.position_embed

    @property
    def head(self) -> CaptionHead:
        return self.multimodal.head

    def forward(self, tokens_BT: Tensor, memory_BLD: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """Returns hidden states [B, T, D], before the head; arguments as of `TextDecoder`."""
        first = len(self.unimodal.blocks)
        lower, upper = (None, None) if caches is None else (caches[:first], caches[first:])
        x, _ = self.unimodal(tokens_BT, caches=lower)
        return self.multimodal(x, memory_BLD, caches=upper)
