"""GenLIP (arXiv 2605.00809): the vision encoder itself writes the caption, after the image's tokens.

Where the authors differ: their blocks have gated attention and rotary positions, and no class token. Dimension letters:
B batch, L = 1 + N image tokens, D width, T tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mug.model import flops
from mug.model.captioner import WritesCaptions
from mug.model.captioning import CaptionTask, autoregressive, with_rows
from mug.model.encoder import Encoder
from mug.model.generate import Decoder
from mug.model.objectives.objective import Batch, Context, Losses, Metrics
from mug.model.presets import FROM_PRESET, EncoderConfig, Vocabulary, at_least
from mug.model.text_decoder import Cache, CaptionHead
from mug.model.vit import Block, init_weights


@dataclass(frozen=True)
class GenLIPConfig(EncoderConfig):
    """Sizes of the one transformer of image and caption.

    Args:
        text_length: tokens of a caption, BOS and EOS included.
    """

    text_length: int = FROM_PRESET

    def check(self) -> None:
        super().check()
        at_least(self, 2, "text_length")


class TokenEmbed(nn.Module):
    def __init__(self, config: GenLIPConfig, vocabulary: Vocabulary):
        super().__init__()
        self.embed = nn.Embedding(vocabulary.size, config.width)
        self.position_embed = nn.Parameter(0.02 * torch.randn(config.text_length, config.width))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Returns [B, T, D]."""
        return self.embed(tokens_BT) + self.position_embed[: tokens_BT.shape[1]]


class GenLIP(WritesCaptions):
    """Reads uint8 `image` [B, 3, H, W], int64 `tokens` [B, T] (BOS … EOS PAD; a row of PAD alone is a sample without
    caption) and int64 `position` [B].

    The image's tokens see each other, those of the caption see them and what comes before.
    """

    Config = GenLIPConfig
    losses: ClassVar = {"caption": 1.0}
    zero3_leaves = (Block,)

    def __init__(self, config: GenLIPConfig, context: Context):
        super().__init__(config, context)
        self.encoder = Encoder(config)
        self.token_embed = TokenEmbed(config, self.vocabulary)
        self.head = CaptionHead(config.width, self.vocabulary)
        self.apply(init_weights)

    def prepare(self, batch: Batch) -> Batch:
        """Adds the rows of captions, see `captioning.with_rows`; a batch that has them stays as it is."""
        return batch if "kept_rows" in batch else with_rows(batch, self._task(batch), self.vocabulary.pad)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of tokens to predict."""
        return {"caption": len(self.prepare(batch)["kept_rows"])}

    def flops(self, batch: Batch) -> float:
        """Returns FLOP without padding of captions, and without what the masks of attention hide."""
        config, B, L = self.config, len(batch["position"]), 1 + self.config.patches
        length_B = L + (batch["tokens"] != self.vocabulary.pad).sum(1)
        tokens, pairs = float(length_B.sum()), float((L**2 + length_B.square()).sum()) / 2
        total = flops.linear(B * config.patches, config.patch_values, config.width)
        total += flops.blocks(config.width, config.depth, tokens, pairs)
        return total + flops.linear(self.counts(batch)["caption"], config.width, self.vocabulary.size)

    def forward(self, batch: Batch) -> tuple[Losses, Metrics]:
        batch = self.prepare(batch)
        row_R, task = batch["packed_rows"], self._task(batch)
        hidden_RD = self._states(batch["image"], task.inputs).flatten(0, 1)[row_R]
        loss, accuracy = self.head(hidden_RD, task.targets.flatten()[row_R], batch["kept_rows"])
        return {"caption": loss}, {"accuracy/caption": accuracy}

    def _task(self, batch: Batch) -> CaptionTask:
        return autoregressive(batch["tokens"], batch["position"], self.vocabulary, self.context.seed)

    def _states(self, image_BCHW: Tensor, tokens_BT: Tensor) -> Tensor:
        """Returns the states of a caption's tokens, [B, T, D]. Padding comes last, where no token sees it."""
        L = 1 + self.config.patches
        prefix_B = torch.full((len(image_BCHW),), L, device=image_BCHW.device)
        return self.encoder(image_BCHW, words_BTD=self.token_embed(tokens_BT), keys_B=prefix_B, causal=True)[:, L:]

    @property
    def writer(self) -> Decoder:
        """Each token costs a forward pass of image and caption: the encoder keeps no keys and values."""
        return _Writer(self)

    def memory(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW


class _Writer:
    """A GenLIP, called as a decoder whose memory is the image itself and whose cache holds the tokens so far."""

    def __init__(self, model: GenLIP):
        self.model, self.head = model, model.head
        self.position_embed, self.blocks = model.token_embed.position_embed, nn.ModuleList([model.encoder])

    def __call__(self, tokens_BT: Tensor, memory_BCHW: Tensor, *, caches: list[Cache] | None = None) -> Tensor:
        for cache in caches or ():
            tokens_BT = torch.cat([cache["tokens"], tokens_BT], dim=1) if "tokens" in cache else tokens_BT
            cache["tokens"] = tokens_BT
        return self.model._states(memory_BCHW, tokens_BT)
