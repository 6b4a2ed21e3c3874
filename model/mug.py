"""MUG (arXiv 2301.07088): one encoder, a pixel decoder and a text decoder, two losses.

Dimension letters: B batch, N patches, K visible, M masked, P values of a patch, L = 1 + K, D width, T tokens.
"""

from torch import Tensor, nn

from mug.kernels.masked_patch_loss import masked_patch_loss
from mug.model import captioning
from mug.model.encoder import PIXEL_MEAN, PIXEL_STD, Encoder
from mug.model.pixel_decoder import PixelDecoder
from mug.model.presets import ModelConfig, ModelConfigError, Vocabulary
from mug.model.random_choices import random_masking
from mug.model.text_decoder import TextBlock, TextDecoder
from mug.model.vit import Block, init_weights

Batch = dict[str, Tensor]


class MUG(nn.Module):
    """The objective: `losses, report = mug(batch)`.

    `config` is resolved (see presets.resolve). `seed` fixes, with a sample's position, which patches and words
    are masked. `batch` holds uint8 `image` [B, 3, H, W], int64 `tokens` [B, T] (BOS … EOS PAD; a row of PAD
    alone is a sample without caption) and int64 `position` [B]. A loss that `terms` leaves out is not computed; its
    decoder is there, but gets no gradient.
    """

    terms = ("pixels", "caption")

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, seed: int = 0, terms: tuple[str, ...] = terms):
        super().__init__()
        if config.captioning == "masked-language" and vocabulary.mask is None:
            raise ModelConfigError("model.captioning masked-language needs a tokenizer with a mask token")
        self.config, self.vocabulary, self.seed, self.terms = config, vocabulary, seed, terms
        self.captioning = captioning.FUNCTIONS[config.captioning]
        self.encoder = Encoder(config)
        self.pixel_decoder = PixelDecoder(config)
        self.text_decoder = TextDecoder(config, vocabulary)
        self.apply(init_weights)

    @property
    def zero3_leaves(self) -> list[type[nn.Module]]:
        """Modules that ZeRO-3 gathers as a whole: one exchange a block instead of one a layer."""
        return [Block, TextBlock]

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many terms each loss is a mean over: masked patches, and tokens to predict."""
        counts = {}
        if "pixels" in self.terms:
            counts["pixels"] = len(batch["position"]) * (self.config.patches - self.config.visible)
        if "caption" in self.terms:
            task = self.captioning(batch["tokens"], batch["position"], self.vocabulary, self.seed)
            counts["caption"] = int((task.targets != self.vocabulary.pad).sum())
        return counts

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(losses, report): fp32 scalars by term; detached figures to log, named kind/term."""
        image, tokens, position = batch["image"], batch["tokens"], batch["position"]
        visible_BK, masked_BM = self.forward_mask(position)  # [B, K], [B, M]
        encoded_BLD = self.encoder(image, visible_BK)  # [B, 1 + K, D]
        losses, report = {}, {}
        if "pixels" in self.terms:
            losses["pixels"] = self.forward_pixels(image, encoded_BLD, visible_BK, masked_BM)
        if "caption" in self.terms:
            losses["caption"], report["accuracy/caption"] = self.forward_caption(tokens, position, encoded_BLD)
        return losses, report

    def forward_mask(self, position_B: Tensor) -> tuple[Tensor, Tensor]:
        """The patches to see [B, K] and to predict [B, M], by (seed, position)."""
        return random_masking(self.seed, position_B, self.config.patches, self.config.visible)

    def forward_pixels(self, image_BCHW: Tensor, encoded_BLD: Tensor, visible_BK: Tensor, masked_BM: Tensor) -> Tensor:
        prediction_BMP = self.pixel_decoder(encoded_BLD, visible_BK, masked_BM)  # [B, M, P]
        return masked_patch_loss(
            image_BCHW,
            prediction_BMP,
            masked_BM,
            patch_size=self.config.patch_size,
            mean=PIXEL_MEAN,
            std=PIXEL_STD,
            normalize_patches=self.config.normalize_patches,
        )

    def forward_caption(self, tokens_BT: Tensor, position_B: Tensor, encoded_BLD: Tensor) -> tuple[Tensor, Tensor]:
        task = self.captioning(tokens_BT, position_B, self.vocabulary, self.seed)  # [B, T] each
        hidden_BTD = self.text_decoder(
            task.inputs, encoded_BLD, causal=task.causal, lengths_B=task.lengths_B
        )  # [B, T, D]
        return self.text_decoder.head(hidden_BTD, task.targets)


OBJECTIVES = {"mug": MUG}
