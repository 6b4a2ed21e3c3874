"""M3AE (arXiv 2205.14204): one encoder sees visible patches and visible words, one decoder reconstructs the others.

Where the authors differ: they draw one mask for all samples of a device, and count padding among the words.
Dimension letters: B batch, N patches, K visible, M masked, P values of a patch, S words at most, W visible at most,
L = 1 + K + W, D width, T tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mug.model import flops
from mug.model.captioning import words_of
from mug.model.encoder import Encoder
from mug.model.generate import paint
from mug.model.keyed_random import WORDS, random_bits, random_masking
from mug.model.objectives.objective import Batch, Context, Losses, Metrics, Objective, with_tensors
from mug.model.pixel_decoder import patch_loss
from mug.model.positions import sincos_1d, sincos_2d
from mug.model.presets import FROM_PRESET, PixelDecoderConfig, Vocabulary, at_least, between_0_and_1
from mug.model.text_decoder import CaptionHead
from mug.model.vit import Block, LayerNorm, init_weights


@dataclass(frozen=True)
class M3AEConfig(PixelDecoderConfig):
    """Sizes of an encoder and a decoder of patches and words.

    Args:
        normalize_patches: regress each patch less its mean, over its standard deviation.
        text_length: tokens of a caption, BOS and EOS included, which the model does not read.
        word_mask_ratio: share of a caption's words hidden from the encoder; at least one word is.
    """

    normalize_patches: bool = False
    text_length: int = FROM_PRESET
    word_mask_ratio: float = 0.75

    def check(self) -> None:
        super().check()
        at_least(self, 3, "text_length")
        between_0_and_1(self, "word_mask_ratio")

    @property
    def words(self) -> int:
        """S, words of a caption."""
        return self.text_length - 2

    @property
    def visible_words(self) -> int:
        """W, words that the encoder sees of the longest caption, and of no shorter one more."""
        return self.words - int(hidden_words(torch.tensor(self.words), self.word_mask_ratio))


def hidden_words(words: Tensor, ratio: float) -> Tensor:
    """Returns how many of so many words are hidden."""
    return (words * ratio + 0.5).long().clamp(min=1).minimum(words)


class Words(NamedTuple):
    """Captions' words in random order, first the visible, then the hidden ones; the rest is padding.

    tokens_BS, place_BS: int64 [B, S], the words and their places in the caption. visible_B, count_B: int64 [B].
    """

    tokens_BS: Tensor
    place_BS: Tensor
    visible_B: Tensor
    count_B: Tensor

    @property
    def hidden_BS(self) -> Tensor:
        """Returns bool [B, S], True where a word is to be predicted."""
        slot_S = torch.arange(self.tokens_BS.shape[1], device=self.tokens_BS.device)
        return (slot_S >= self.visible_B[:, None]) & (slot_S < self.count_B[:, None])


class WordEmbed(nn.Module):
    """Embeds words: their vector, their place, and a constant for what is not a patch. The constant of patches is the
    bias of the encoder's patch projection."""

    positions_TD: Tensor

    def __init__(self, config: M3AEConfig, vocabulary: Vocabulary):
        super().__init__()
        self.embed = nn.Embedding(vocabulary.size, config.width)
        self.type_D = nn.Parameter(0.02 * torch.randn(config.width))
        positions_TD = sincos_1d(config.width, torch.arange(config.text_length)).float()
        self.register_buffer("positions_TD", positions_TD, persistent=False)

    def forward(self, tokens_BW: Tensor, place_BW: Tensor) -> Tensor:
        """Returns [B, W, D]."""
        return (self.embed(tokens_BW) + self.positions_TD[place_BW] + self.type_D).to(self.type_D.dtype)


class JointDecoder(nn.Module):
    """Reconstructs patches and words; `losses` names those of its heads that it has."""

    positions_ND: Tensor
    positions_TD: Tensor

    def __init__(self, config: M3AEConfig, vocabulary: Vocabulary, losses: tuple[str, ...]):
        super().__init__()
        width = config.pixel_width
        self.embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.word_mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.image_type_D = nn.Parameter(0.02 * torch.randn(width))
        self.word_type_D = nn.Parameter(0.02 * torch.randn(width))
        positions_TD = sincos_1d(width, torch.arange(config.text_length)).float()
        self.register_buffer("positions_ND", sincos_2d(width, config.grid), persistent=False)
        self.register_buffer("positions_TD", positions_TD, persistent=False)
        self.blocks = nn.ModuleList(Block(width, config.pixel_heads) for _ in range(config.pixel_depth))
        self.norm = LayerNorm(width)
        if "pixels" in losses:
            self.pred = nn.Linear(width, config.patch_values)
        if "caption" in losses:
            self.head = CaptionHead(width, vocabulary)

    def forward(
        self, encoded_BLD: Tensor, visible_BK: Tensor, masked_BM: Tensor, words: Words
    ) -> tuple[Tensor, Tensor]:
        """Returns the states of the masked patches [B, M, D], in the order of `masked_BM`, and of all words [B, S, D],
        in theirs."""
        (B, K), M, S = visible_BK.shape, masked_BM.shape[1], words.tokens_BS.shape[1]
        x = self.embed(encoded_BLD)
        cls_B1D, patch_BKD, word_BWD = x[:, :1], x[:, 1 : 1 + K], x[:, 1 + K :]
        patch_BND = torch.cat([patch_BKD, self.mask_token.expand(B, M, -1)], dim=1)
        patch_BND = patch_BND + self.positions_ND[torch.cat([visible_BK, masked_BM], dim=1)] + self.image_type_D
        hidden_BRD = self.word_mask_token.expand(B, S - word_BWD.shape[1], -1)
        word_BSD = torch.cat([word_BWD, hidden_BRD], dim=1)
        word_BSD = word_BSD.where(~words.hidden_BS[..., None], self.word_mask_token)
        word_BSD = word_BSD + self.positions_TD[words.place_BS] + self.word_type_D
        dtype = self.mask_token.dtype  # a bf16 model keeps its buffers in fp32
        x = torch.cat([cls_B1D, patch_BND.to(dtype), word_BSD.to(dtype)], dim=1)  # [B, 1 + N + S, D]
        for block in self.blocks:
            x = block(x, 1 + K + M + words.count_B)
        x = self.norm(x)
        return x[:, 1 + K : 1 + K + M], x[:, 1 + K + M :]


class M3AE(Objective):
    """Reads uint8 `image` [B, 3, H, W], int64 `tokens` [B, T] (BOS … EOS PAD; a row of PAD alone is a sample without
    caption) and int64 `position` [B], which decides with the seed which patches and words are masked."""

    Config = M3AEConfig
    losses: ClassVar = {"pixels": 1.0, "caption": 0.5}  # as in the authors' recipe
    zero3_leaves = (Block,)

    def __init__(self, config: M3AEConfig, context: Context):
        super().__init__(config, context)
        self.encoder = Encoder(config)
        self.word_embed = WordEmbed(config, self.vocabulary)
        self.decoder = JointDecoder(config, self.vocabulary, self.active)
        self.apply(init_weights)
        nn.init.normal_(self.word_embed.embed.weight)  # the authors' standard deviation of 1

    def prepare(self, batch: Batch) -> Batch:
        """Adds which words to predict: int64 `kept_rows` [K], places among the B·S. A batch that has them stays."""
        if "caption" not in self.active or "kept_rows" in batch:
            return batch
        kept_K = self.words(batch["tokens"], batch["position"]).hidden_BS.flatten().nonzero().squeeze(1)
        return with_tensors(batch, {"kept_rows": kept_K})

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the numbers of masked patches, and of hidden words."""
        counts = {}
        if "pixels" in self.active:
            counts["pixels"] = len(batch["position"]) * (self.config.patches - self.config.visible)
        if "caption" in self.active:
            counts["caption"] = len(self.prepare(batch)["kept_rows"])
        return counts

    def flops(self, batch: Batch) -> float:
        """Returns FLOP without padding of captions."""
        config, B = self.config, len(batch["position"])
        words = self.words(batch["tokens"], batch["position"])
        seen_B, all_B = 1 + config.visible + words.visible_B, 1 + config.patches + words.count_B
        seen, everything = ((float(length_B.sum()), float(length_B.square().sum())) for length_B in (seen_B, all_B))
        total = flops.linear(B * config.visible, config.patch_values, config.width)
        total += flops.blocks(config.width, config.depth, *seen)
        total += flops.linear(seen[0], config.width, config.pixel_width)
        total += flops.blocks(config.pixel_width, config.pixel_depth, *everything)
        outputs = {"pixels": config.patch_values, "caption": self.vocabulary.size}
        counts = self.counts(batch)
        return total + sum(flops.linear(counts[loss], config.pixel_width, outputs[loss]) for loss in counts)

    def forward(self, batch: Batch) -> tuple[Losses, Metrics]:
        batch = self.prepare(batch)
        visible_BK, masked_BM = self.mask(batch["position"])
        words = self.words(batch["tokens"], batch["position"])
        patch_BMD, word_BSD = self._decode(batch["image"], visible_BK, masked_BM, words)
        losses, metrics = {}, {}
        if "pixels" in self.active:
            prediction_BMP = self.decoder.pred(patch_BMD)
            losses["pixels"] = patch_loss(self.config, batch["image"], prediction_BMP, masked_BM)
        if "caption" in self.active:
            target_BS = words.tokens_BS.masked_fill(~words.hidden_BS, self.vocabulary.pad)
            rows = word_BSD.flatten(0, 1), target_BS.flatten(), batch["kept_rows"]
            losses["caption"], metrics["accuracy/caption"] = self.decoder.head(*rows)
        return losses, metrics

    def mask(self, position_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the patches to see [B, K] and to predict [B, M], by (seed, position)."""
        return random_masking(self.context.seed, position_B, self.config.patches, self.config.visible)

    def words(self, tokens_BT: Tensor, position_B: Tensor) -> Words:
        """Returns the words to see and to predict, by (seed, position)."""
        word_BT = words_of(tokens_BT, self.vocabulary)
        draw_BT = random_bits(self.context.seed, WORDS, position_B, tokens_BT.shape[1])
        order_BT = draw_BT.masked_fill(~word_BT, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        place_BS, count_B = order_BT[:, : self.config.words], word_BT.sum(1)
        hidden_B = hidden_words(count_B, self.config.word_mask_ratio)
        return Words(tokens_BT.gather(1, place_BS), place_BS, count_B - hidden_B, count_B)

    def _decode(self, image_BCHW: Tensor, visible_BK: Tensor, masked_BM: Tensor, words: Words) -> tuple[Tensor, Tensor]:
        W = self.config.visible_words
        words_BWD = self.word_embed(words.tokens_BS[:, :W], words.place_BS[:, :W])
        keys_B = 1 + visible_BK.shape[1] + words.visible_B
        encoded_BLD = self.encoder(image_BCHW, visible_BK, words_BTD=words_BWD, keys_B=keys_B)
        return self.decoder(encoded_BLD, visible_BK, masked_BM, words)

    def reconstruct(self, image_BCHW: Tensor, position_B: Tensor) -> tuple[Tensor, Tensor]:
        """Of images alone, as of samples without caption."""
        visible_BK, masked_BM = self.mask(position_B)
        prediction_BMP = None
        if "pixels" in self.active:
            tokens_BT = position_B.new_full((len(position_B), self.config.text_length), self.vocabulary.pad)
            words = self.words(tokens_BT, position_B)
            prediction_BMP = self.decoder.pred(self._decode(image_BCHW, visible_BK, masked_BM, words)[0])
        return paint(self.config, image_BCHW, masked_BM, prediction_BMP)
