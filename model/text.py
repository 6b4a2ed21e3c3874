"""A text encoder: blocks that see only text, and the state of a caption's last token.

Padding costs nothing: captions are packed end to end. Dimension letters: B batch, T tokens, R tokens of all captions
packed, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mug.model.presets import FROM_PRESET, TextConfig, Vocabulary, at_least
from mug.model.text_decoder import TextBlock, embed_words, pack, packed_rows
from mug.model.vit import LayerNorm


@dataclass(frozen=True)
class TextEncoderConfig(TextConfig):
    """A text encoder (CLIP, arXiv 2103.00020, section 2.4).

    Args:
        text_layers: its blocks.
        causal: each token sees only those before it, as in CLIP.
    """

    text_layers: int = FROM_PRESET
    causal: bool = True

    def check(self) -> None:
        super().check()
        at_least(self, 1, "text_layers")


class TextEncoder(nn.Module):
    def __init__(self, config: TextEncoderConfig, vocabulary: Vocabulary):
        super().__init__()
        self.causal, self.pad = config.causal, vocabulary.pad
        self.embed = nn.Embedding(vocabulary.size, config.text_width)
        self.position_embed = nn.Parameter(torch.empty(config.text_length, config.text_width))
        nn.init.normal_(self.position_embed, std=0.01)
        blocks = (TextBlock(config.text_width, config.text_heads) for _ in range(config.text_layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(config.text_width)

    def forward(self, tokens_BT: Tensor, row_R: Tensor | None = None) -> Tensor:
        """Returns the normalised state [B, D] of each caption's last token, EOS; of one PAD where there is no caption.

        Args:
            tokens_BT: int64 [B, T], BOS … EOS PAD.
            row_R: int64 [R], see `rows`; without it, the host waits for a GPU.

        Raises:
            ValueError: more tokens than the model's text length.
        """
        lengths_B, T = (tokens_BT != self.pad).sum(1), tokens_BT.shape[1]
        packing = pack(lengths_B, T, 0, row_R)
        x_RD = embed_words(self.embed, self.position_embed, tokens_BT, packing)
        for block in self.blocks:
            x_RD = block(x_RD, None, self.causal, packing, None)
        return self.norm(x_RD[packing.starts[1:].long() - 1])

    def rows(self, tokens_BT: Tensor) -> Tensor:
        """Returns int64 [R], the places among B·T of the tokens that are not padding."""
        return packed_rows((tokens_BT != self.pad).sum(1), tokens_BT.shape[1])
