"""AIMv2 (arXiv 2411.14402): a causal decoder of image and caption regresses each next patch and names each next token.

Where the authors differ: their encoder has no class token (here it belongs to the prefix), and their blocks have
RMSNorm and SwiGLU. Dimension letters: B batch, N patches, L = 1 + N image tokens, M = N - 1, P values of a patch,
D width, T tokens of a caption, R image and text tokens of all samples packed.
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
from mug.model.keyed_random import PREFIX, random_bits
from mug.model.objectives.objective import Batch, Context, Losses, Metrics
from mug.model.pixel_decoder import patch_loss
from mug.model.presets import FROM_PRESET, ModelConfigError, TextConfig, Vocabulary, at_least
from mug.model.text_decoder import Cache, CaptionHead, Packing, TextBlock, pack
from mug.model.vit import Block, LayerNorm, init_weights


@dataclass(frozen=True)
class AIMv2Config(TextConfig):
    """Sizes of an encoder and of a decoder of patches and words.

    Args:
        text_layers: blocks of the decoder, which has the width and the heads of the text blocks.
        normalize_patches: regress each patch less its mean, over its standard deviation.
    """

    text_layers: int = FROM_PRESET
    normalize_patches: bool = True

    def check(self) -> None:
        super().check()
        at_least(self, 1, "text_layers")
        if self.patches < 2:
            raise ModelConfigError("an image of one patch has no next one: lower model.patch_size")


class MultimodalDecoder(nn.Module):
    """A causal transformer of image and caption; `losses` names those of its heads that it has."""

    def __init__(self, config: AIMv2Config, vocabulary: Vocabulary, losses: tuple[str, ...]):
        super().__init__()
        width = config.text_width
        self.embed_image = nn.Linear(config.width, width)
        if "pixels" in losses:
            self.pred = nn.Linear(width, config.patch_values)
        if "caption" in losses:
            self.embed = nn.Embedding(vocabulary.size, width)
            self.position_embed = nn.Parameter(0.02 * torch.randn(config.text_length, width))
            self.head = CaptionHead(width, vocabulary)
        self.blocks = nn.ModuleList(TextBlock(width, config.text_heads) for _ in range(config.text_layers))
        self.norm = LayerNorm(width)

    def forward(
        self,
        tokens_BT: Tensor | None,
        memory_BLD: Tensor,
        *,
        packing: Packing | None = None,
        caches: list[Cache] | None = None,
    ) -> Tensor:
        """Returns hidden states, before the heads.

        Args:
            tokens_BT: int64 [B, T]; with `caches`, the one newest token, [B, 1]. None: there are no captions.
            memory_BLD: [B, L, encoder width], the encoder's output: these tokens come first.
            packing: of `pack`, the tokens that are not padding, among B·(L + T).
            caches: one dict a layer, filled and grown here; they begin with the image.

        Returns:
            [B, L + T, D], or packed [R, D]; of an image that the caches hold already, only of the tokens; normalised.
        """
        cached = caches[0]["k"].shape[1] if caches and "k" in caches[0] else 0
        parts = [] if cached else [self.embed_image(memory_BLD)]
        if tokens_BT is not None:
            start = cached and cached - memory_BLD.shape[1]
            parts.append(self.embed(tokens_BT) + self.position_embed[start : start + tokens_BT.shape[1]])
        x = torch.cat(parts, dim=1)
        if packing is not None:
            x = x.flatten(0, 1)[packing.row_R]
        for layer, block in enumerate(self.blocks):
            x = block(x, None, True, packing, None if caches is None else caches[layer])
        return self.norm(x)


class AIMv2(WritesCaptions):
    """Reads uint8 `image` [B, 3, H, W], int64 `tokens` [B, T] (BOS … EOS PAD; a row of PAD alone is a sample without
    caption) and int64 `position` [B], which decides with the seed how long the prefix is.

    In training the encoder's tokens see the prefix and what comes before them; afterwards, all see all.
    """

    Config = AIMv2Config
    losses: ClassVar = {"pixels": 0.4, "caption": 1.0}  # as in the authors' recipe
    zero3_leaves = (Block, TextBlock)

    def __init__(self, config: AIMv2Config, context: Context):
        super().__init__(config, context)
        self.encoder = Encoder(config)
        self.decoder = MultimodalDecoder(config, self.vocabulary, self.active)
        self.apply(init_weights)

    @property
    def reads_captions(self) -> bool:
        return "caption" in self.active

    def prepare(self, batch: Batch) -> Batch:
        """Adds the rows of image and caption, see `captioning.with_rows`; a batch that has them stays as it is."""
        return batch if "kept_rows" in batch else with_rows(batch, self._task(batch), self.vocabulary.pad)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the numbers of patches behind the prefixes, and of tokens to predict."""
        counts = {}
        if "pixels" in self.active:
            counts["pixels"] = int((self.config.patches - self.prefix(batch["position"])).sum())
        if "caption" in self.active:
            counts["caption"] = len(self.prepare(batch)["kept_rows"])
        return counts

    def flops(self, batch: Batch) -> float:
        """Returns FLOP without padding of captions, for which the model computes nothing, and without what the masks
        of attention hide."""
        config, B, L = self.config, len(batch["position"]), 1 + self.config.patches
        known_B, length_B = 1 + self.prefix(batch["position"]), self._task(batch).lengths_B
        tokens, pairs = float(length_B.sum()), float(length_B.square().sum()) / 2
        total = flops.linear(B * config.patches, config.patch_values, config.width)
        total += flops.blocks(config.width, config.depth, B * L, float((L**2 + known_B.square()).sum()) / 2)
        total += flops.linear(B * L, config.width, config.text_width)
        total += flops.blocks(config.text_width, config.text_layers, tokens, pairs)
        outputs = {"pixels": config.patch_values, "caption": self.vocabulary.size}
        counts = self.counts(batch)
        return total + sum(flops.linear(counts[loss], config.text_width, outputs[loss]) for loss in counts)

    def forward(self, batch: Batch) -> tuple[Losses, Metrics]:
        batch = self.prepare(batch)
        prefix_B, task = self.prefix(batch["position"]), self._task(batch)
        encoded_BLD = self.encoder(batch["image"], keys_B=1 + prefix_B, causal=True)
        packing = pack(task.lengths_B, task.inputs.shape[1], 0, batch["packed_rows"])
        tokens_BT = batch["tokens"] if "caption" in self.active else None
        hidden_RD = self.decoder(tokens_BT, encoded_BLD, packing=packing)
        losses, metrics = {}, {}
        if "pixels" in self.active:
            losses["pixels"] = self._pixel_loss(batch["image"], hidden_RD, packing.starts[:-1], prefix_B)
        if "caption" in self.active:
            rows = hidden_RD, task.targets.flatten()[packing.row_R], batch["kept_rows"]
            losses["caption"], metrics["accuracy/caption"] = self.decoder.head(*rows)
        return losses, metrics

    def prefix(self, position_B: Tensor) -> Tensor:
        """Returns int64 [B], the patches of each prefix: uniform from 1 to N - 1, by (seed, position)."""
        return 1 + random_bits(self.context.seed, PREFIX, position_B, 1)[:, 0] % (self.config.patches - 1)

    def _task(self, batch: Batch) -> CaptionTask:
        """Returns the prediction of tokens, [B, L + T] each: after the image, which has no targets, the caption's."""
        B, L = len(batch["position"]), 1 + self.config.patches
        image_BL = batch["position"].new_full((B, L), self.vocabulary.pad)
        if "caption" not in self.active:
            return CaptionTask(image_BL, image_BL, causal=True, lengths_B=batch["position"].new_full((B,), L))
        task = autoregressive(batch["tokens"], batch["position"], self.vocabulary, self.context.seed)
        inputs, targets = (torch.cat([image_BL, part_BT], dim=1) for part_BT in (task.inputs, task.targets))
        return CaptionTask(inputs, targets, causal=True, lengths_B=L + task.lengths_B)

    def _pixel_loss(self, image_BCHW: Tensor, hidden_RD: Tensor, start_B: Tensor, prefix_B: Tensor) -> Tensor:
        """Returns the mean squared error of the patches behind the prefix, each predicted by the token before it, the
        sample's token of the same number: the class token is number 0."""
        config = self.config
        number_M = torch.arange(config.patches - 1, device=prefix_B.device)
        next_BM = (prefix_B[:, None] + number_M).clamp(max=config.patches - 1)  # from counts_B on, any
        prediction_BMP = self.decoder.pred(hidden_RD[start_B[:, None] + next_BM])
        return patch_loss(config, image_BCHW, prediction_BMP, next_BM, config.patches - prefix_B)

    @property
    def writer(self) -> Decoder:
        return self.decoder
