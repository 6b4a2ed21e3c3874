"""An encoder with a linear layer on top, trained end to end on labelled images (MAE, arXiv 2111.06377, appendix A.1).

Dimension letters: B batch, N patches, D width, C classes.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from mug.model import flops
from mug.model.encoder import Encoder
from mug.model.objectives.objective import Batch, Context, Losses, Metrics, Objective
from mug.model.presets import TunedEncoderConfig
from mug.model.stochastic_depth import prepare_for_finetuning, sample_drop_path
from mug.model.vit import Block, init_weights


@dataclass(frozen=True)
class ClassifyConfig(TunedEncoderConfig):
    """An encoder and a linear head.

    Args:
        pool: mean of the patch tokens, or cls, the class token.
    """

    pool: Literal["mean", "cls"] = "mean"


class Classify(Objective):
    """Reads uint8 `image` [B, 3, H, W], fp32 `target` [B, C] (each row sums to 1) and int64 `position` [B].

    The encoder's positions are a parameter, and its last norm stands behind the pooling.
    """

    Config = ClassifyConfig
    losses: ClassVar = {"class": 1.0}
    kinds = ("labelled",)
    zero3_leaves = (Block,)

    def __init__(self, config: ClassifyConfig, context: Context):
        super().__init__(config, context)
        self.encoder = Encoder(config, config.norm_eps).apply(init_weights)
        self.drops = prepare_for_finetuning(self.encoder, config.drop_path)
        self.head = nn.Linear(config.width, len(context.class_names))
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def adopt(self, encoder: Encoder) -> None:
        """Load the encoder; pooled by mean, the norm is reinitialized, as in MAE's fine-tuning."""
        state = encoder.state_dict() | {"positions_ND": encoder.positions_ND}
        if self.config.pool == "mean":
            state |= {f"norm.{name}": value for name, value in self.encoder.norm.state_dict().items()}
        self.encoder.load_state_dict(state)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Images."""
        return {"class": len(batch["position"])}

    def flops(self, batch: Batch) -> float:
        head = flops.linear(1, self.config.width, len(self.context.class_names))
        return len(batch["position"]) * (flops.encoder(self.config) + head)

    def forward(self, batch: Batch) -> tuple[Losses, Metrics]:
        """Returns cross-entropy; top-1 and top-5 accuracy on the class with the largest weight."""
        if self.training:
            sample_drop_path(self.drops, self.context.seed, batch["position"])
        logits_BC, target_BC = self.logits(batch["image"]).float(), batch["target"]
        loss = -(target_BC * logits_BC.log_softmax(1)).sum(1).mean()
        true_B = target_BC.argmax(1)
        best_B5 = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
        hit_B5 = best_B5 == true_B[:, None]
        metrics = {"accuracy/class": hit_B5[:, 0].float().mean(), "accuracy5/class": hit_B5.any(1).float().mean()}
        return {"class": loss}, metrics

    def logits(self, image_BCHW: Tensor) -> Tensor:
        """Returns logits [B, C] of uint8 images [B, 3, H, W]."""
        (tokens_BLD,) = self.encoder(image_BCHW, taps=(self.config.depth,))  # [B, 1 + N, D]
        pooled_BD = tokens_BLD[:, 1:].mean(1) if self.config.pool == "mean" else tokens_BLD[:, 0]
        return self.head(self.encoder.norm(pooled_BD))
