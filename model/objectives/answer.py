"""Answers questions about images, and classifies statements: the fusion encoder of UniX² and an MLP (§4.3.2).

The image and the text are read and fused as in `unix2`, whose parts `encoder`, `text_encoder` and `fusion_encoder` this
can begin with; an MLP on the state of the fusion encoder's own token chooses among the answers. Where the paper is
silent: the MLP is UNITER's (arXiv 1909.11740; width D, 2D, K, with GELU and a norm), and there is no dropout.
Dimension letters: B images, S texts, T tokens, F states of all fused sequences packed, K answers.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from mug.model import flops
from mug.model.encoder import Encoder
from mug.model.multilingual import FusionConfig, FusionEncoder, LayerNorm, MultilingualEncoder, fused_rows
from mug.model.objectives.objective import Batch, Context, Losses, Metrics, Objective, with_tensors
from mug.model.text_decoder import CaptionHead, TextBlock, pack, packed_rows
from mug.model.texts import lengths_of
from mug.model.vit import Block, init_weights


@dataclass(frozen=True)
class AnswerConfig(FusionConfig):
    """What is read, and how answers are learned.

    Args:
        loss: cross_entropy over the answers, or binary: that of each answer by itself, summed, as models of visual
            questions with many answers have it.
    """

    loss: Literal["cross_entropy", "binary"] = "cross_entropy"


class Answer(Objective):
    """Reads uint8 `image` [B, 3, H, W], int64 `tokens` [B, T], a source as of mug.model.texts, int64 `label` [B], the
    number of the answer or -1 of one that is not among the K (it has no loss), and int64 `position` [B]."""

    Config = AnswerConfig
    losses: ClassVar = {"answer": 1.0}
    kinds = ("questions",)
    zero3_leaves = (Block, TextBlock)

    def __init__(self, config: AnswerConfig, context: Context):
        super().__init__(config, context)
        width, answers = config.text_width, len(context.class_names)
        self.encoder = Encoder(config)
        self.encoder.learn_positions()
        self.text_encoder = MultilingualEncoder(config, CaptionHead(width, self.vocabulary))
        self.fusion_encoder = FusionEncoder(config)
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), LayerNorm(2 * width), nn.Linear(2 * width, answers)
        )
        self.apply(init_weights)

    def prepare(self, batch: Batch) -> Batch:
        """Adds int64 `text_rows`, which of the tokens there are, and `fused_rows` [F] and `fused_lengths` [B] of the
        sequences, so that nothing waits for a GPU; a batch that has them stays as it is."""
        if "fused_rows" in batch:
            return batch
        return with_tensors(batch, self._rows(batch["tokens"], len(batch["tokens"])))

    def counts(self, batch: Batch) -> dict[str, int]:
        """Questions whose answer is among the K."""
        return {"answer": int((batch["label"] >= 0).sum())}

    def flops(self, batch: Batch) -> float:
        """Returns FLOP without padding of texts."""
        batch, config, B = self.prepare(batch), self.config, len(batch["tokens"])
        width, lengths_B = config.text_width, lengths_of(batch["tokens"], self.vocabulary)
        total = B * (flops.encoder(config) + flops.linear(1 + config.patches, config.width, width))
        for layers, lengths in ((config.text_layers, lengths_B), (config.fusion_layers, batch["fused_lengths"])):
            total += flops.blocks(width, layers, float(lengths.sum()), float(lengths.square().sum()))
        return total + flops.mlp(B, (width, 2 * width, len(self.context.class_names)))

    def forward(self, batch: Batch) -> tuple[Losses, Metrics]:
        """Returns the loss, and the share of answers that are right: those with the highest logit."""
        batch = self.prepare(batch)
        logits_BK, label_B = self._logits(batch["image"], batch["tokens"], batch), batch["label"]
        known_B = (label_B >= 0).float()
        if self.config.loss == "cross_entropy":
            loss_B = cross_entropy(logits_BK, label_B, ignore_index=-1, reduction="none")
        else:
            target_BK = one_hot(label_B.clamp(min=0), logits_BK.shape[1]).float()
            loss_B = binary_cross_entropy_with_logits(logits_BK, target_BK, reduction="none").sum(1) * known_B
        count = known_B.sum().clamp(min=1)
        right = (logits_BK.argmax(1) == label_B).sum() / count
        return {"answer": loss_B.sum() / count}, {"accuracy/answer": right}

    def answer(self, image_BCHW: Tensor, tokens_ST: Tensor) -> Tensor:
        """Returns fp32 logits [S, K] of texts about images, S a multiple of B: text s is about image s mod B."""
        return self._logits(image_BCHW, tokens_ST, self._rows(tokens_ST, len(image_BCHW)))

    def _rows(self, tokens_ST: Tensor, B: int) -> dict[str, Tensor]:
        """Returns what `prepare` adds, of texts about B images."""
        lengths_S, L = lengths_of(tokens_ST, self.vocabulary).clamp(min=1), 1 + self.config.patches
        row_F, _ = fused_rows(lengths_S, 0, L, B)
        text_rows = packed_rows(lengths_S, tokens_ST.shape[1])
        return {"text_rows": text_rows, "fused_rows": row_F, "fused_lengths": 1 + L + lengths_S}

    def _logits(self, image_BCHW: Tensor, tokens_ST: Tensor, rows: dict[str, Tensor]) -> Tensor:
        T = tokens_ST.shape[1]
        text = pack(lengths_of(tokens_ST, self.vocabulary), T, 0, rows["text_rows"])
        fused = pack(rows["fused_lengths"], 2 + self.config.patches + T, 0, rows["fused_rows"])
        image_BLD = self.encoder(image_BCHW)
        x_FD = self.fusion_encoder(image_BLD, self.text_encoder(tokens_ST, text), rows["fused_rows"], fused)
        return self.head(x_FD[fused.starts[:-1].long()]).float()
