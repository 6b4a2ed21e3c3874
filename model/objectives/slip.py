"""SLIP (arXiv 2112.12750): CLIP on one view of an image, and SimCLR on two more.

Dimension letters: B batch, D width, E size of the joint embedding.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from mug.model import flops
from mug.model.augment import augment_views
from mug.model.heads import check_scale, class_tokens, projector
from mug.model.objectives.clip import CLIP, CLIPConfig
from mug.model.objectives.objective import Batch, Context, Losses, Metrics, View
from mug.model.objectives.simclr import SimCLRConfig, nt_xent
from mug.model.two_views import alike
from mug.model.vit import init_weights


@dataclass(frozen=True)
class SLIPConfig(CLIPConfig, SimCLRConfig):
    """Sizes of two encoders, their joint space, and the projection head of the images.

    Args:
        image_scale: min and max share of an image's area that its caption's view covers; it is not mirrored.
    """

    image_scale: tuple[float, float] = (0.5, 1.0)

    def check(self) -> None:
        super().check()
        check_scale(self, "image_scale")


class SLIP(CLIP):
    """Reads uint8 `views` [B, 3, 3, H, W], the first of them the caption's, and int64 `tokens` [B, T] as CLIP does.

    Both losses are gathered with gradient; the authors' code does so for SimCLR's alone.
    """

    Config = SLIPConfig
    losses: ClassVar = {"contrastive": 1.0, "views": 1.0}

    def __init__(self, config: SLIPConfig, context: Context):
        super().__init__(config, context)
        self.projector = projector(config.projector_widths, last_norm=False).apply(init_weights)

    @classmethod
    def views(cls, config: SLIPConfig) -> tuple[View, ...]:
        return View(config.image_scale, flip=False), *alike(config.view_scale)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of samples with a caption, and of all."""
        counts = super().counts(batch) | {"views": len(batch["views"])}
        return {name: counts[name] for name in self.active}

    def flops(self, batch: Batch) -> float:
        views = 2 * (flops.encoder(self.config) + flops.mlp(1, self.config.projector_widths))
        found = {"contrastive": super().flops(batch), "views": len(batch["views"]) * views}
        return sum(found[name] for name in self.active)

    def features(self, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        if "views" not in self.active:
            return super().features({**batch, "image": batch["views"][:, 0]})
        views = augment_views(batch["views"], self.views(self.config), self.context.seed, batch["position"])
        if "contrastive" not in self.active:
            first_BD, second_BD = class_tokens(self.encoder, views[1:])
            return {"first": first_BD, "second": second_BD}, None
        image_BD, first_BD, second_BD = class_tokens(self.encoder, views)
        batch = self.prepare(batch)
        pair = {
            "image": normalize(self.image_projection(image_BD).float(), dim=-1),
            "text": self._embed_text(batch["tokens"], batch["packed_rows"]),
            "captioned": self._captioned(batch["tokens"]),
        }
        return {**pair, "first": first_BD, "second": second_BD}, None

    def coupled_losses(self, features: dict[str, Tensor]) -> tuple[Losses, Metrics]:
        losses, metrics = super().coupled_losses(features) if "contrastive" in self.active else ({}, {})
        if "views" in self.active:
            temperature = self.config.temperature
            of_views = nt_xent(self.projector, features["first"], features["second"], temperature)
            losses, metrics = losses | of_views[0], metrics | of_views[1]
        return losses, metrics
