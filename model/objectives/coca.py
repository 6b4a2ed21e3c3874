"""CoCa (arXiv 2205.01917): captions that are matched to their images as in CLIP, and written, by one text decoder.

Dimension letters: B batch, T tokens, L encoded image tokens, Q queries, R tokens of all captions packed, D width,
E size of the embedding.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import normalize

from mug.model import flops
from mug.model.attention_pooler import AttentionPooler
from mug.model.captioner import WritesCaptions
from mug.model.contrastive import LogitScale, pair_loss
from mug.model.encoder import Encoder
from mug.model.objectives.objective import Batch, Context, CoupledObjective, Losses, Metrics, with_tensors
from mug.model.presets import FROM_PRESET, TextDecoderConfig, at_least
from mug.model.text_decoder import Packing, TextBlock, pack, packed_rows
from mug.model.texts import lengths_of
from mug.model.two_stage_decoder import TwoStageDecoder
from mug.model.vit import Block, init_weights


@dataclass(frozen=True)
class CoCaConfig(TextDecoderConfig):
    """Sizes of the encoder, the text decoder and the joint space.

    Args:
        embedding_width: size of the joint embedding.
        image_queries: states that the encoder's output is pooled to for the text decoder.
    """

    embedding_width: int = FROM_PRESET
    image_queries: int = 256

    def check(self) -> None:
        super().check()
        at_least(self, 1, "embedding_width", "image_queries", "text_unimodal_layers", "text_cross_layers")


class CoCa(WritesCaptions, CoupledObjective):
    """Reads uint8 `image` [B, 3, H, W] and int64 `tokens` [B, T], BOS … EOS PAD; a row of PAD alone is a sample without
    caption: neither query nor key, and nothing to write.

    The image is pooled by attention in two steps, as in the paper: to `image_queries` states that the decoder reads,
    and these to the one that is embedded. A loss that is not active is not computed; its parts get no gradient.
    """

    Config = CoCaConfig
    losses: ClassVar = {"contrastive": 1.0, "caption": 2.0}  # section 4.1
    zero3_leaves = (Block, TextBlock)

    def __init__(self, config: CoCaConfig, context: Context):
        super().__init__(config, context)
        self.encoder = Encoder(config)
        self.caption_pooler = AttentionPooler(config.image_queries, config.width, config.heads)
        self.embedding_pooler = AttentionPooler(1, config.width, config.heads)
        self.text_decoder = TwoStageDecoder(config, self.vocabulary)
        self.image_projection = nn.Linear(config.width, config.embedding_width, bias=False)
        self.text_projection = nn.Linear(config.text_width, config.embedding_width, bias=False)
        self.scale = LogitScale()
        self.apply(init_weights)

    def prepare(self, batch: Batch) -> Batch:
        """Adds which tokens there are, and which have a next one: int64 `packed_rows` [R], places among the B·T tokens,
        and `kept_rows` [K], places among these R. A batch that has them stays as it is."""
        if "kept_rows" in batch:
            return batch
        row_R = packed_rows(lengths_of(batch["tokens"], self.vocabulary), batch["tokens"].shape[1])
        kept_K = (self._targets(batch["tokens"])[row_R] != self.vocabulary.pad).nonzero().squeeze(1)
        return with_tensors(batch, {"packed_rows": row_R, "kept_rows": kept_K})

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the numbers of samples with a caption, and of tokens to predict."""
        counts = {
            "contrastive": int(self._captioned(batch["tokens"]).sum()),
            "caption": len(self.prepare(batch)["kept_rows"]),
        }
        return {name: counts[name] for name in self.active}

    def flops(self, batch: Batch) -> float:
        config, samples = self.config, len(batch["tokens"])
        tokens, queries = len(self.prepare(batch)["packed_rows"]) / samples, config.image_queries
        pooling = flops.cross_attention(queries, 1 + config.patches, config.width, config.width)
        text = flops.text_blocks(config.text_width, config.text_unimodal_layers, 1 + tokens, causal=True)
        total = flops.encoder(config) + pooling + text
        if "contrastive" in self.active:
            total += flops.cross_attention(1, queries, config.width, config.width)
            total += flops.linear(1, config.width + config.text_width, config.embedding_width)
        if "caption" in self.active:
            cross = flops.cross_attention(tokens, queries, config.text_width, config.width)
            total += flops.text_blocks(config.text_width, config.text_cross_layers, tokens, causal=True)
            total += config.text_cross_layers * cross + flops.linear(tokens, config.text_width, self.vocabulary.size)
        return samples * total

    def features(self, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        batch = self.prepare(batch)
        memory_BQD = self.memory(batch["image"])
        packing = self._packing(batch["tokens"], batch["packed_rows"])
        x_RD, cls_BD = self.text_decoder.unimodal(batch["tokens"], packing)
        rest = x_RD, memory_BQD, packing
        if "contrastive" not in self.active:
            return {}, rest
        image_BE, text_BE = self._embed_memory(memory_BQD), self._embed_cls(cls_BD)
        return {"image": image_BE, "text": text_BE, "captioned": self._captioned(batch["tokens"])}, rest

    def coupled_losses(self, features: dict[str, Tensor]) -> tuple[Losses, Metrics]:
        loss, accuracy = pair_loss(features["image"], features["text"], self.scale(), features["captioned"])
        return {"contrastive": loss}, {"accuracy/contrastive": accuracy}

    def own_losses(self, batch: Batch, rest: tuple[Tensor, Tensor, Packing]) -> tuple[Losses, Metrics]:
        if "caption" not in self.active:
            return {}, {}
        batch, (x_RD, memory_BQD, packing) = self.prepare(batch), rest
        hidden_RD = self.text_decoder.multimodal(x_RD, memory_BQD, packing)
        target_R = self._targets(batch["tokens"])[packing.row_R]
        loss, accuracy = self.text_decoder.head(hidden_RD, target_R, batch["kept_rows"])
        return {"caption": loss}, {"accuracy/caption": accuracy}

    def memory(self, image_BCHW: Tensor) -> Tensor:
        """Returns [B, Q, D]."""
        return self.caption_pooler(self.encoder(image_BCHW))

    def embed_image(self, image_BCHW: Tensor) -> Tensor:
        return self._embed_memory(self.memory(image_BCHW))

    def embed_text(self, tokens_BT: Tensor) -> Tensor:
        return self._embed_cls(self.text_decoder.unimodal(tokens_BT, self._packing(tokens_BT, None))[1])

    def _embed_memory(self, memory_BQD: Tensor) -> Tensor:
        return normalize(self.image_projection(self.embedding_pooler(memory_BQD)[:, 0]).float(), dim=-1)

    def _embed_cls(self, cls_BD: Tensor) -> Tensor:
        return normalize(self.text_projection(cls_BD).float(), dim=-1)

    def _packing(self, tokens_BT: Tensor, row_R: Tensor | None) -> Packing:
        return pack(lengths_of(tokens_BT, self.vocabulary), tokens_BT.shape[1], self.config.image_queries, row_R)

    def _targets(self, tokens_BT: Tensor) -> Tensor:
        """Returns int64 [B·T], of each token the next one, or PAD."""
        return nn.functional.pad(tokens_BT[:, 1:], (0, 1), value=self.vocabulary.pad).flatten()

    def _captioned(self, tokens_BT: Tensor) -> Tensor:
        """bool [B]."""
        return tokens_BT[:, 0] != self.vocabulary.pad
