"""CLIP (arXiv 2103.00020): images and captions in one space, each nearest to its own among those of the group.

Dimension letters: B batch, T tokens, D width, E size of the embedding.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import normalize

from mug.model import flops
from mug.model.contrastive import LogitScale, pair_loss
from mug.model.encoder import Encoder
from mug.model.objectives.objective import Batch, Context, CoupledObjective, Losses, Metrics, with_tensors
from mug.model.presets import FROM_PRESET, at_least
from mug.model.text import TextEncoder, TextEncoderConfig
from mug.model.text_decoder import TextBlock
from mug.model.vit import Block, init_weights


@dataclass(frozen=True)
class CLIPConfig(TextEncoderConfig):
    """Sizes of two encoders and their joint space.

    Args:
        embedding_width: size of the joint embedding.
    """

    embedding_width: int = FROM_PRESET

    def check(self) -> None:
        super().check()
        at_least(self, 1, "embedding_width")


class CLIP(CoupledObjective):
    """Reads uint8 `image` [B, 3, H, W] and int64 `tokens` [B, T], BOS … EOS PAD; a row of PAD alone is a sample without
    caption, which is neither query nor key."""

    Config = CLIPConfig
    losses: ClassVar = {"contrastive": 1.0}
    zero3_leaves = (Block, TextBlock)

    def __init__(self, config: CLIPConfig, context: Context):
        super().__init__(config, context)
        self.encoder = Encoder(config)
        self.text_encoder = TextEncoder(config, self.vocabulary)
        self.image_projection = nn.Linear(config.width, config.embedding_width, bias=False)
        self.text_projection = nn.Linear(config.text_width, config.embedding_width, bias=False)
        self.scale = LogitScale()
        self.apply(init_weights)

    def prepare(self, batch: Batch) -> Batch:
        """Adds int64 `packed_rows` [R], which tokens there are; a batch that has them stays as it is."""
        if "packed_rows" in batch:
            return batch
        return with_tensors(batch, {"packed_rows": self.text_encoder.rows(batch["tokens"])})

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of samples with a caption."""
        return {"contrastive": int(self._captioned(batch["tokens"]).sum())}

    def flops(self, batch: Batch) -> float:
        config, samples = self.config, len(batch["tokens"])
        tokens = len(self.prepare(batch)["packed_rows"]) / samples
        text = flops.text_blocks(config.text_width, config.text_layers, tokens, config.causal)
        heads = flops.linear(1, config.width + config.text_width, config.embedding_width)
        return samples * (flops.encoder(config) + text + heads)

    def features(self, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        batch = self.prepare(batch)
        image_BE = self.embed_image(batch["image"], self.visible(batch["position"]))
        text_BE = self._embed_text(batch["tokens"], batch["packed_rows"])
        return {"image": image_BE, "text": text_BE, "captioned": self._captioned(batch["tokens"])}, None

    def coupled_losses(self, features: dict[str, Tensor]) -> tuple[Losses, Metrics]:
        loss, accuracy = pair_loss(features["image"], features["text"], self.scale(), features["captioned"])
        return {"contrastive": loss}, {"accuracy/contrastive": accuracy}

    def visible(self, position_B: Tensor) -> Tensor | None:
        """Returns int64 [B, K], the patches to see in training; None: all."""
        return None

    def embed_image(self, image_BCHW: Tensor, visible_BK: Tensor | None = None) -> Tensor:
        return normalize(self.image_projection(self.encoder(image_BCHW, visible_BK)[:, 0]).float(), dim=-1)

    def embed_text(self, tokens_BT: Tensor) -> Tensor:
        return self._embed_text(tokens_BT, None)

    def _embed_text(self, tokens_BT: Tensor, row_R: Tensor | None) -> Tensor:
        return normalize(self.text_projection(self.text_encoder(tokens_BT, row_R)).float(), dim=-1)

    def _captioned(self, tokens_BT: Tensor) -> Tensor:
        """bool [B]."""
        return tokens_BT[:, 0] != self.vocabulary.pad
