"""A text encoder, a fusion encoder and a decoder, which share one embedding of words.

As in mBART's published models (arXiv 2001.08210): embeddings times √D, learned positions, a norm after both, pre-norm
blocks, and a norm after the last. Or both encoders as the two halves of an XLM-R (arXiv 1911.02116): embeddings as they
are, post-norm blocks, and none after the last. Sequences are packed end to end. Dimension letters: B batch, S
sequences, T tokens, L encoded image tokens, R tokens of all texts packed, F states of all fused sequences packed, D
width.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mug.model.presets import FROM_PRESET, PRESETS, TextConfig, at_least
from mug.model.text_decoder import Cache, CaptionHead, Packing, TextBlock, embed_words

NORM_EPS = 1e-5  # of mBART's and XLM-R's norms
LayerNorm = partial(nn.LayerNorm, eps=NORM_EPS)
AS_IT_IS = nn.Identity()  # in place of the norm before a layer


def _sizes(
    width: int, heads: int, layers: int, length: int, embedding: int, text_model: str = "mbart"
) -> dict[str, Any]:
    """Returns the sizes of text, with equally many layers in each part."""
    sizes = {"text_width": width, "text_heads": heads, "text_length": length, "embedding_width": embedding}
    sizes |= dict.fromkeys(("text_layers", "fusion_layers", "decoder_layers"), layers)
    return sizes | {"text_model": text_model}


MBART_LARGE = _sizes(1024, 16, 12, 256, 256)
XLMR_BASE = _sizes(768, 12, 6, 256, 256, "xlmr")  # of the variant in table 4 of UniX²


@dataclass(frozen=True)
class FusionConfig(TextConfig):
    """Sizes of the parts that read text, and text with an image.

    Args:
        preset: tiny, small, base, large or huge, whose texts are mBART's; or base-xlmr, whose text and fusion encoder
            are the two halves of XLM-R base.
        text_model: how the encoders of text are built: mbart (norms before each layer) or xlmr (after it).
        text_length: tokens of a text, BOS, EOS and language included.
        text_layers: blocks of the text encoder.
        fusion_layers: blocks of the fusion encoder.
    """

    own_sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": _sizes(192, 3, 2, 32, 128),
        "small": _sizes(512, 8, 6, 128, 256),
        "base": MBART_LARGE,
        "large": MBART_LARGE,
        "huge": MBART_LARGE,
        "base-xlmr": PRESETS["base"] | XLMR_BASE,
    }

    text_model: Literal["mbart", "xlmr"] = FROM_PRESET
    text_layers: int = FROM_PRESET
    fusion_layers: int = FROM_PRESET

    def check(self) -> None:
        super().check()
        at_least(self, 1, "text_layers", "fusion_layers")
        at_least(self, 4, "text_length")  # BOS, a word, EOS and language


@dataclass(frozen=True)
class MultilingualConfig(FusionConfig):
    """Sizes of the parts that read and write text.

    Args:
        decoder_layers: blocks of the decoder.
        embedding_width: size of the joint embedding.
        itm_negatives: which texts do not match an image, drawn from the group: at random, or hard (those that CMCL
            finds near, by the softmax of its similarities).
    """

    decoder_layers: int = FROM_PRESET
    embedding_width: int = FROM_PRESET
    itm_negatives: Literal["random", "hard"] = "random"

    def check(self) -> None:
        super().check()
        at_least(self, 1, "decoder_layers", "embedding_width")


class WordEmbed(nn.Module):
    """Embeds words by their row of a shared matrix, in mBART times √D, and their place."""

    def __init__(self, weight_VD: nn.Parameter, length: int, text_model: str):
        super().__init__()
        self.scale = 1.0 if text_model == "xlmr" else weight_VD.shape[1] ** 0.5
        self.embed = nn.Embedding(weight_VD.shape[0], weight_VD.shape[1])
        self.embed.weight = weight_VD
        self.position_embed = nn.Parameter(0.02 * torch.randn(length, weight_VD.shape[1]))
        self.norm = LayerNorm(weight_VD.shape[1])

    def forward(self, tokens_BT: Tensor, packing: Packing | None, start: int = 0) -> Tensor:
        """Returns [B, T, D], or packed [R, D], of words whose first stands at `start`.

        Raises:
            ValueError: more tokens than there are positions.
        """
        return self.norm(embed_words(self._scaled, self.position_embed, tokens_BT, packing, start))

    def _scaled(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens) * self.scale


class PostNormBlock(TextBlock):
    """A block of RoBERTa: its norms follow each sum."""

    def _layers(
        self, x: Tensor, memory_BLD: Tensor, causal: bool, packing: Packing | None, cache: Cache | None
    ) -> Tensor:
        x = self.norm1(x + self.attn(x, AS_IT_IS, causal, packing, cache))
        return self.norm2(x + self.mlp(x, AS_IT_IS))


class MultilingualEncoder(nn.Module):
    def __init__(self, config: FusionConfig, head: CaptionHead):
        super().__init__()
        # A target has no BOS; as a source it is one token longer.
        self.words = WordEmbed(head.weight, config.text_length + 1, config.text_model)
        self.blocks, self.norm = _encoder_blocks(config, config.text_layers)

    def forward(self, tokens_BT: Tensor, packing: Packing) -> Tensor:
        """Returns the normalised states, packed [R, D], of int64 tokens [B, T], each of which sees its entire text."""
        x_RD = self.words(tokens_BT, packing)
        for block in self.blocks:
            x_RD = block(x_RD, None, False, packing, None)
        return self.norm(x_RD)


class FusionEncoder(nn.Module):
    """Lets words and patches see each other in one sequence: a token of its own, the image's states, the text's.

    `MM_CLS`, the first, stands for the pair (section 3.2.2 of UniX²). A sequence may lack the image.
    """

    def __init__(self, config: FusionConfig):
        super().__init__()
        width = config.text_width
        self.cls_D = nn.Parameter(0.02 * torch.randn(width))
        self.image_type_D = nn.Parameter(0.02 * torch.randn(width))
        self.text_type_D = nn.Parameter(0.02 * torch.randn(width))
        self.image_projection = nn.Linear(config.width, width)
        self.image_norm = LayerNorm(width)
        self.blocks, self.norm = _encoder_blocks(config, config.fusion_layers)

    def forward(self, image_BLD: Tensor | None, text_RD: Tensor, row_F: Tensor, packing: Packing) -> Tensor:
        """Returns the normalised states, packed [F, D].

        Args:
            image_BLD: [B, L, encoder width], None where no sequence has an image.
            text_RD: packed states of the texts.
            row_F: int64, of each state its place among 1 token, B·L and R states: see `fused_rows`.
            packing: of the sequences.
        """
        parts = [self.cls_D[None], text_RD + self.text_type_D]
        if image_BLD is not None:
            parts.insert(1, (self.image_norm(self.image_projection(image_BLD)) + self.image_type_D).flatten(0, 1))
        # Not [row_F], whose gradient adds row after row into those that stand in many sequences.
        x_FD = nn.functional.embedding(row_F, torch.cat(parts))
        for block in self.blocks:
            x_FD = block(x_FD, None, False, packing, None)
        return self.norm(x_FD)


def fused_rows(lengths_S: Tensor, first: int, L: int, B: int) -> tuple[Tensor, Tensor]:
    """Returns (row_F, text_F) of sequences that the fusion encoder sees, the texts from number `first` on.

    Sequence s has the image s mod B. On a GPU the host waits.

    Args:
        lengths_S: int64, the tokens of all texts, at least 1.
        first: the number of texts that are in no sequence; a multiple of B.
        L: states of an image; 0 without images.

    Returns:
        row_F: int64, of each state its place among the token of the encoder's own, B·L states and those of all texts.
        text_F: bool, which of them are text.
    """
    starts_S1, lengths_S1 = (lengths_S.cumsum(0) - lengths_S)[first:, None], lengths_S[first:, None]
    S, T, device = len(lengths_S) - first, int(lengths_S.max()), lengths_S.device
    image_S1, slot_N = torch.arange(S, device=device)[:, None] % B, torch.arange(1 + L + T, device=device)
    image_SL, text_ST = 1 + L * image_S1 + slot_N[:L], 1 + B * L + starts_S1 + slot_N[:T]
    place_SN = torch.cat([torch.zeros_like(image_S1), image_SL, text_ST], dim=1)
    kept_SN = slot_N < 1 + L + lengths_S1
    return place_SN[kept_SN], (slot_N > L).expand_as(kept_SN)[kept_SN]


class MultilingualDecoder(nn.Module):
    """Writes text, given the states of a fused sequence, as mBART's does. Its head and embedding are one matrix."""

    def __init__(self, config: MultilingualConfig, head: CaptionHead):
        super().__init__()
        self.words = WordEmbed(head.weight, config.text_length, config.text_model)
        width, heads = config.text_width, config.text_heads
        blocks = (TextBlock(width, heads, width, NORM_EPS) for _ in range(config.decoder_layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(config.text_width)
        self.head = head

    @property
    def position_embed(self) -> Tensor:
        return self.words.position_embed

    def forward(
        self,
        tokens_BT: Tensor,
        memory: Tensor,
        *,
        packing: Packing | None = None,
        caches: list[Cache] | None = None,
    ) -> Tensor:
        """Returns the normalised states [B, T, D], or packed [R, D], each of which predicts the next token.

        Args:
            tokens_BT: int64 [B, T], language … EOS PAD; with `caches`, the one newest token, [B, 1].
            memory: [B, L, D], or packed as `packing` says.
            packing: of the tokens, and of the memory. None: all T tokens count.
            caches: one dict a layer, filled and grown here.
        """
        start = caches[0]["k"].shape[1] if caches and "k" in caches[0] else 0
        x = self.words(tokens_BT, packing, start)
        for layer, block in enumerate(self.blocks):
            x = block(x, memory, True, packing, None if caches is None else caches[layer])
        return self.norm(x)


class MaskedHead(nn.Module):
    """Prepares states for the shared matrix, as BERT's head does."""

    def __init__(self, width: int):
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = LayerNorm(width)

    def forward(self, x_KD: Tensor) -> Tensor:
        return self.norm(nn.functional.gelu(self.transform(x_KD)))


def _encoder_blocks(config: FusionConfig, layers: int) -> tuple[nn.ModuleList, nn.Module]:
    """Returns blocks of an encoder, and the norm after the last."""
    post_norm = config.text_model == "xlmr"
    kind = PostNormBlock if post_norm else TextBlock
    blocks = (kind(config.text_width, config.text_heads, norm_eps=NORM_EPS) for _ in range(layers))
    return nn.ModuleList(blocks), nn.Identity() if post_norm else LayerNorm(config.text_width)
