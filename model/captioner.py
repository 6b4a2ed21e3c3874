"""What objectives share that write captions, and those that learn from captions alone, by an encoder and a decoder.

Dimension letters: B batch, L encoded image tokens, M of them that the decoder sees, D width, T tokens.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from mug.model import flops
from mug.model.captioning import CaptionTask, autoregressive, caption_loss, with_rows
from mug.model.encoder import Encoder
from mug.model.generate import Decoder, word_attention, write
from mug.model.likelihood import log_likelihoods
from mug.model.objectives.objective import Batch, Context, Losses, Metrics, Objective, ObjectiveError
from mug.model.presets import TextDecoderConfig
from mug.model.text_decoder import TextBlock, TextDecoder
from mug.model.vit import Block, init_weights


class WritesCaptions(Objective):
    """An objective that writes captions, and tells how likely they are: `writer` does, of an image's `memory`."""

    text_decoder: Any

    @property
    def writer(self) -> Decoder:
        return self.text_decoder

    def memory(self, image_BCHW: Tensor) -> Tensor:
        return self.encoder(image_BCHW)

    def check_captions(self) -> None:
        if "caption" not in self.active:
            raise ObjectiveError("the model never learned to write captions: its loss_weights.caption is 0")

    def caption(self, image_BCHW: Tensor, beams: int = 1) -> Tensor:
        return write(self.writer, self.vocabulary, self.memory(image_BCHW), beams)

    def caption_log_likelihoods(self, image_BCHW: Tensor, tokens_CT: Tensor) -> Tensor:
        return log_likelihoods(self.writer, self.vocabulary.pad, self.memory(image_BCHW), tokens_CT)


class Captioner(WritesCaptions):
    """Reads uint8 `image` [B, 3, H, W], int64 `tokens` [B, T] (BOS … EOS PAD; a row of PAD alone is a sample without
    caption) and int64 `position` [B], which decides every random choice with the seed."""

    losses: ClassVar = {"caption": 1.0}
    zero3_leaves = (Block, TextBlock)

    def __init__(self, config: TextDecoderConfig, context: Context):
        super().__init__(config, context)
        self.encoder = Encoder(config)
        self.text_decoder = TextDecoder(config, self.vocabulary)
        self.apply(init_weights)
        if not config.tied_head:  # as in CapPa's code
            nn.init.normal_(self.text_decoder.embed.weight)
            nn.init.zeros_(self.text_decoder.head.weight)

    def task(self, batch: Batch) -> CaptionTask:
        """Returns what the decoder sees and predicts."""
        return autoregressive(batch["tokens"], batch["position"], self.vocabulary, self.context.seed)

    def seen(self, encoded_BLD: Tensor, position_B: Tensor) -> Tensor:
        """Returns [B, M, D], those of the encoder's tokens that the decoder sees in training."""
        return encoded_BLD

    @property
    def seen_tokens(self) -> int:
        """M."""
        return 1 + self.config.patches

    def prepare(self, batch: Batch) -> Batch:
        """Adds the rows of captions, see `captioning.with_rows`; a batch that has them stays as it is."""
        return batch if "kept_rows" in batch else with_rows(batch, self.task(batch), self.vocabulary.pad)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of tokens to predict."""
        return {"caption": len(self.prepare(batch)["kept_rows"])}

    def flops(self, batch: Batch) -> float:
        """Returns FLOP without padding of captions, for which the model computes nothing."""
        config, samples = self.config, len(batch["tokens"])
        tokens = int((batch["tokens"] != self.vocabulary.pad).sum()) / samples
        decoder = flops.text_decoder(config, tokens, self.seen_tokens)
        head = flops.linear(tokens, config.text_width, self.vocabulary.size)
        return samples * (flops.encoder(config) + decoder + head)

    def forward(self, batch: Batch) -> tuple[Losses, Metrics]:
        batch = self.prepare(batch)
        memory_BMD = self.seen(self.encoder(batch["image"]), batch["position"])
        loss, accuracy = caption_loss(self.text_decoder, self.task(batch), memory_BMD, batch)
        return {"caption": loss}, {"accuracy/caption": accuracy}

    def word_attention(self, image_BCHW: Tensor, tokens_BT: Tensor) -> Tensor | None:
        if not self.config.text_cross_layers:
            return None
        return word_attention(self.text_decoder, tokens_BT, self.encoder(image_BCHW))[..., 1:]  # less the class token
