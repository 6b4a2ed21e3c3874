"""MUG (arXiv 2301.07088): one encoder, a pixel decoder and a text decoder, two losses.

Dimension letters: B batch, N patches, K visible, M masked, P values of a patch, L = 1 + K, D width, T tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mug.model import captioning, flops
from mug.model.captioner import WritesCaptions
from mug.model.encoder import Encoder
from mug.model.generate import paint, word_attention, write
from mug.model.keyed_random import random_masking
from mug.model.objectives.objective import Batch, Context, Losses, Metrics, ObjectiveError
from mug.model.pixel_decoder import PixelDecoder
from mug.model.presets import ModelConfigError, PixelDecoderConfig, TextDecoderConfig
from mug.model.text_decoder import TextBlock, TextDecoder
from mug.model.vit import Block, init_weights


@dataclass(frozen=True)
class MUGConfig(PixelDecoderConfig, TextDecoderConfig):
    """Sizes of MUG's three parts; None takes the preset's value.

    Args:
        captioning: autoregressive, or masked-language (BERT's objective, conditioned on the image).
    """

    captioning: str = "autoregressive"

    def check(self) -> None:
        super().check()
        if self.captioning not in captioning.FUNCTIONS:
            known = ", ".join(captioning.FUNCTIONS)
            raise ModelConfigError(f"model.captioning {self.captioning!r} is not one of {known}")


class MUG(WritesCaptions):
    """Reads uint8 `image` [B, 3, H, W], int64 `tokens` [B, T] (BOS … EOS PAD; a row of PAD alone is a sample without
    caption) and int64 `position` [B], which decides with the seed which patches and words are masked.

    A loss that is not active is not computed, and has no decoder.
    """

    Config = MUGConfig
    losses: ClassVar = {"pixels": 1.0, "caption": 0.1}  # section 3.2
    zero3_leaves = (Block, TextBlock)

    def __init__(self, config: MUGConfig, context: Context):
        super().__init__(config, context)
        if config.captioning == "masked-language" and self.vocabulary.mask is None:
            raise ModelConfigError("model.captioning masked-language needs a tokenizer with a mask token")
        self.seed = context.seed
        self.captioning = captioning.FUNCTIONS[config.captioning]
        self.encoder = Encoder(config)
        if "pixels" in self.active:
            self.pixel_decoder = PixelDecoder(config)
        if "caption" in self.active:
            self.text_decoder = TextDecoder(config, self.vocabulary)
        self.apply(init_weights)

    @property
    def reads_captions(self) -> bool:
        return "caption" in self.active

    def prepare(self, batch: Batch) -> Batch:
        """Adds the rows of captions, see `captioning.with_rows`; a batch that has them stays as it is."""
        if "caption" not in self.active or "kept_rows" in batch:
            return batch
        return captioning.with_rows(batch, self._task(batch), self.vocabulary.pad)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the numbers of masked patches, and of tokens to predict."""
        counts = {}
        if "pixels" in self.active:
            counts["pixels"] = len(batch["position"]) * (self.config.patches - self.config.visible)
        if "caption" in self.active:
            counts["caption"] = len(self.prepare(batch)["kept_rows"])
        return counts

    def flops(self, batch: Batch) -> float:
        """Returns FLOP without padding of captions, for which the model computes nothing."""
        samples = len(batch["tokens"])
        tokens = int((batch["tokens"] != self.vocabulary.pad).sum()) / samples
        stages = stage_flops(self.config, self.vocabulary.size, tokens, self.active)
        return samples * sum(stages.values())

    def forward(self, batch: Batch) -> tuple[Losses, Metrics]:
        batch = self.prepare(batch)
        visible_BK, masked_BM = self.mask(batch["position"])
        encoded_BLD = self.encoder(batch["image"], visible_BK)  # [B, 1 + K, D]
        losses, metrics = {}, {}
        if "pixels" in self.active:
            losses["pixels"] = self.pixel_decoder.loss(batch["image"], encoded_BLD, visible_BK, masked_BM)
        if "caption" in self.active:
            parts = self.text_decoder, self._task(batch), encoded_BLD, batch
            losses["caption"], metrics["accuracy/caption"] = captioning.caption_loss(*parts)
        return losses, metrics

    def mask(self, position_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the patches to see [B, K] and to predict [B, M], by (seed, position)."""
        return random_masking(self.seed, position_B, self.config.patches, self.config.visible)

    def _task(self, batch: Batch) -> captioning.CaptionTask:
        return self.captioning(batch["tokens"], batch["position"], self.vocabulary, self.seed)

    def check_captions(self) -> None:
        if self.config.captioning != "autoregressive":
            raise ObjectiveError("the model fills in masked words (model.captioning) and cannot write captions")
        super().check_captions()

    def caption_visible(self, image_BCHW: Tensor, position_B: Tensor, beams: int = 1) -> Tensor:
        visible_BK, _ = self.mask(position_B)
        return write(self.text_decoder, self.vocabulary, self.encoder(image_BCHW, visible_BK), beams)

    def word_attention(self, image_BCHW: Tensor, tokens_BT: Tensor) -> Tensor | None:
        if not self.config.text_cross_layers:
            return None
        return word_attention(self.text_decoder, tokens_BT, self.encoder(image_BCHW))[..., 1:]  # less the class token

    def reconstruct(self, image_BCHW: Tensor, position_B: Tensor) -> tuple[Tensor, Tensor]:
        visible_BK, masked_BM = self.mask(position_B)
        prediction_BMP = None
        if "pixels" in self.active:
            prediction_BMP = self.pixel_decoder(self.encoder(image_BCHW, visible_BK), visible_BK, masked_BM)
        return paint(self.config, image_BCHW, masked_BM, prediction_BMP)


def stage_flops(
    config: MUGConfig, vocabulary_size: int, tokens: float | None = None, losses: tuple[str, ...] = tuple(MUG.losses)
) -> dict[str, float]:
    """Returns the FLOP of a sample, forward and backward, by stage: encoder, pixel_decoder, text_decoder, caption_head.

    Args:
        tokens: of the caption; None: one that fills the model's text length, as in published numbers.
        losses: those that are computed; the stages of others are left out.
    """
    stages = {"encoder": flops.encoder(config)}
    tokens = config.text_length if tokens is None else tokens
    if "pixels" in losses:
        stages["pixel_decoder"] = flops.pixel_decoder(config)
    if "caption" in losses:
        causal = config.captioning == "autoregressive"
        stages["text_decoder"] = flops.text_decoder(config, tokens, 1 + config.visible, causal)
        stages["caption_head"] = flops.linear(tokens, config.text_width, vocabulary_size)
    return stages
