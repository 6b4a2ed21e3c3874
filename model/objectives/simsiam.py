"""SimSiam (arXiv 2011.10566): from one view of an image, predict the projection of the other.

Dimension letters: B batch, D width, E size of a projection.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from mug.model import flops
from mug.model.encoder import Encoder
from mug.model.heads import ProjectorConfig, projector, spread
from mug.model.objectives.objective import Batch, Context, Losses, Metrics
from mug.model.presets import at_least
from mug.model.two_views import TwoViews
from mug.model.vit import init_weights


@dataclass(frozen=True)
class SimSiamConfig(ProjectorConfig):
    """Sizes of an encoder, its projection head, and the predictor.

    Args:
        projector_width: width of the projector's hidden layers.
        projection_width: size of its output.
        predictor_width: width of the predictor's hidden layer.
        view_scale: min and max share of an image's area that a view covers; `data.crop_scale` is refused.
    """

    projector_width: int = 2048
    projection_width: int = 2048
    predictor_width: int = 512
    view_scale: tuple[float, float] = (0.2, 1.0)

    def check(self) -> None:
        super().check()
        at_least(self, 1, "predictor_width")

    @property
    def predictor_widths(self) -> tuple[int, ...]:
        return self.projection_width, self.predictor_width, self.projection_width


class SimSiam(TwoViews):
    """Samples meet in the heads' batch norms alone. The predictor's learning rate is constant (section 3)."""

    Config = SimSiamConfig
    constant_rate = ("predictor",)

    def __init__(self, config: SimSiamConfig, context: Context):
        super().__init__(config, context)
        self.encoder = Encoder(config)
        self.projector = projector(config.projector_widths)
        self.predictor = projector(config.predictor_widths, last_norm=False)
        self.apply(init_weights)

    def flops(self, batch: Batch) -> float:
        config = self.config
        heads = flops.mlp(1, config.projector_widths) + flops.mlp(1, config.predictor_widths)
        return 2 * len(batch["views"]) * (flops.encoder(config) + heads)

    def coupled_losses(self, features: dict[str, Tensor]) -> tuple[Losses, Metrics]:
        """Returns `views`, from -1 to 0: equation 2, each view with statistics of its own in the batch norms."""
        projections = [self.projector(features[view]) for view in ("first", "second")]
        predictions = [self.predictor(projection_BE) for projection_BE in projections]
        first, second = (
            self.similarity(prediction_BE, projection_BE).mean()
            for prediction_BE, projection_BE in zip(predictions, reversed(projections), strict=True)
        )
        spreads = spread(normalize(torch.cat(projections).float(), dim=-1))
        return {"views": -(first + second) / 2}, {f"{name}/views": value for name, value in spreads.items()}

    @staticmethod
    def similarity(prediction_BE: Tensor, projection_BE: Tensor) -> Tensor:
        """Returns the cosines fp32 [B], with no gradient to the projection, without which all outputs become equal."""
        return cosine_similarity(prediction_BE.float(), projection_BE.detach().float(), dim=-1)
