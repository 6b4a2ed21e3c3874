"""What objectives share that compare two views of each image.

Dimension letters: B batch, D width.
"""

from typing import Any, ClassVar

from torch import Tensor

from mug.model.augment import augment_views
from mug.model.heads import ProjectorConfig, class_tokens
from mug.model.objectives.objective import Batch, CoupledObjective, View
from mug.model.vit import Block


def alike(view_scale: tuple[float, float]) -> tuple[View, View]:
    """Returns two views with the same distribution: SimCLR's colours, as mild as SimSiam and SLIP have them."""
    view = View(view_scale, jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5)
    return view, view


class TwoViews(CoupledObjective):
    """Reads uint8 `views` [B, 2, 3, H, W] and int64 `position` [B]; its one loss, `views`, is a mean over samples."""

    losses: ClassVar = {"views": 1.0}
    zero3_leaves = (Block,)

    @classmethod
    def views(cls, config: ProjectorConfig) -> tuple[View, ...]:
        return alike(config.view_scale)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of samples."""
        return {"views": len(batch["views"])}

    def images(self, batch: Batch) -> list[Tensor]:
        """Returns the views in their colours, fp32 [B, 3, H, W] each."""
        return augment_views(batch["views"], self.views(self.config), self.context.seed, batch["position"])

    def features(self, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        """Returns the class tokens [B, D] of both views."""
        first_BD, second_BD = class_tokens(self.encoder, self.images(batch))
        return {"first": first_BD, "second": second_BD}, None
