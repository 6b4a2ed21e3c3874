"""SimCLR (arXiv 2002.05709): two views of an image, each nearest to the other among all views of the group.

Dimension letters: B batch, D width, E size of a projection.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mug.model import flops
from mug.model.contrastive import two_view_loss
from mug.model.encoder import Encoder
from mug.model.heads import ProjectorConfig, projector, spread
from mug.model.objectives.objective import Batch, Context, Losses, Metrics
from mug.model.presets import more_than_zero
from mug.model.two_views import TwoViews
from mug.model.vit import init_weights


@dataclass(frozen=True)
class SimCLRConfig(ProjectorConfig):
    """Sizes of an encoder and its projection head.

    Args:
        temperature: what cosines are divided by.
    """

    temperature: float = 0.1

    def check(self) -> None:
        super().check()
        more_than_zero(self, "temperature")


class SimCLR(TwoViews):
    """Colours and head are those of SLIP's ViT (arXiv 2112.12750): a milder jitter than SimCLR's, and a last layer
    without batch norm. As in SimCLR, the head's batch norms see both views together."""

    Config = SimCLRConfig

    def __init__(self, config: SimCLRConfig, context: Context):
        super().__init__(config, context)
        self.encoder = Encoder(config)
        self.projector = projector(config.projector_widths, last_norm=False)
        self.apply(init_weights)

    def flops(self, batch: Batch) -> float:
        return 2 * len(batch["views"]) * (flops.encoder(self.config) + flops.mlp(1, self.config.projector_widths))

    def coupled_losses(self, features: dict[str, Tensor]) -> tuple[Losses, Metrics]:
        return nt_xent(self.projector, features["first"], features["second"], self.config.temperature)


def nt_xent(head: nn.Module, first_BD: Tensor, second_BD: Tensor, temperature: float) -> tuple[Losses, Metrics]:
    """Returns the loss `views` of two views' class tokens, and its metrics."""
    views_BE = normalize(head(torch.cat([first_BD, second_BD])).float(), dim=-1)
    first_BE, second_BE = views_BE.chunk(2)
    loss, accuracy = two_view_loss(first_BE, second_BE, temperature)
    metrics = {f"{name}/views": value for name, value in spread(views_BE).items()}
    return {"views": loss}, {"accuracy/views": accuracy, **metrics}
