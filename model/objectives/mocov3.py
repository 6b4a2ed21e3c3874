"""MoCo v3 (arXiv 2104.02057): from one view of an image, find what a slowly following teacher makes of the other.

Dimension letters: B batch, D width, E size of a projection.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mug.model import flops
from mug.model.contrastive import contrastive_loss
from mug.model.encoder import Encoder, PatchEmbed
from mug.model.heads import ProjectorConfig, class_tokens, projector, spread
from mug.model.momentum import cosine_momentum, teacher_of
from mug.model.objectives.objective import Batch, Context, Losses, Metrics, View
from mug.model.presets import ModelConfigError, more_than_zero
from mug.model.two_views import TwoViews
from mug.model.vit import init_weights


@dataclass(frozen=True)
class MoCoV3Config(ProjectorConfig):
    """Sizes of an encoder, its projection head and the predictor, and how they learn.

    Args:
        temperature: what cosines are divided by.
        momentum: of the teacher at the first step; it rises to 1 along half a cosine.
    """

    temperature: float = 0.2
    momentum: float = 0.99

    def check(self) -> None:
        super().check()
        more_than_zero(self, "temperature")
        if not 0 <= self.momentum < 1:
            raise ModelConfigError(f"model.momentum must be at least 0 and less than 1, not {self.momentum}")

    @property
    def predictor_widths(self) -> tuple[int, ...]:
        return self.projection_width, self.projector_width, self.projection_width


class FrozenPatchEmbed(PatchEmbed):
    """The random projection of patches, which stays as drawn: it made training unstable (section 4.2)."""

    @torch.no_grad()
    def forward(self, image_BCHW: Tensor, visible_BK: Tensor | None) -> Tensor:
        return super().forward(image_BCHW, visible_BK)


class MoCoV3(TwoViews):
    """The keys are the teacher's projections of the other view, of the entire group; there is no queue."""

    Config = MoCoV3Config
    teachers: ClassVar = {"teacher_encoder": "encoder", "teacher_projector": "projector"}
    frozen = ("encoder.patch_embed",)

    def __init__(self, config: MoCoV3Config, context: Context):
        super().__init__(config, context)
        self.encoder = Encoder(config)
        self.encoder.patch_embed = FrozenPatchEmbed(config.patch_size, config.width)
        self.projector = projector(config.projector_widths)
        self.predictor = projector(config.predictor_widths)
        self.apply(init_weights)
        self.teacher_encoder, self.teacher_projector = teacher_of(self.encoder), teacher_of(self.projector)

    @classmethod
    def views(cls, config: ProjectorConfig) -> tuple[View, ...]:
        """Returns one view that is always blurred, and one that is solarized at times."""
        blurred = View(config.view_scale, jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur=1.0)
        return blurred, replace(blurred, blur=0.1, solarize=0.2)

    def adopt(self, encoder: Encoder) -> None:
        super().adopt(encoder)
        self.teacher_encoder.load_state_dict(encoder.state_dict())

    def momentum_at(self, progress: float) -> float:
        return cosine_momentum(self.config.momentum, progress)

    def flops(self, batch: Batch) -> float:
        followed = flops.encoder(self.config) + flops.mlp(1, self.config.projector_widths)
        teacher = followed / 3  # which has no backward
        return 2 * len(batch["views"]) * (followed + teacher + flops.mlp(1, self.config.predictor_widths))

    def features(self, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        """Returns the class tokens [B, D] of both views, the student's and the teacher's."""
        images = self.images(batch)
        first_BD, second_BD = class_tokens(self.encoder, images)
        with torch.no_grad():
            first_key_BD, second_key_BD = class_tokens(self.teacher_encoder, images)
        return {"first": first_BD, "second": second_BD, "first key": first_key_BD, "second key": second_key_BD}, None

    def coupled_losses(self, features: dict[str, Tensor]) -> tuple[Losses, Metrics]:
        """Returns `views`: 2τ times the InfoNCE of both views (algorithm 1)."""
        queries = [self._unit(self.predictor(self.projector(features[view]))) for view in ("first", "second")]
        with torch.no_grad():
            keys = [self._unit(self.teacher_projector(features[f"{view} key"])) for view in ("second", "first")]
        temperature = self.config.temperature
        found = [contrastive_loss(q_BE, k_BE, 1 / temperature) for q_BE, k_BE in zip(queries, keys, strict=True)]
        (first, first_accuracy), (second, second_accuracy) = found
        metrics = {f"{name}/views": value for name, value in spread(torch.cat(queries)).items()}
        accuracy = (first_accuracy + second_accuracy) / 2
        return {"views": 2 * temperature * (first + second)}, {"accuracy/views": accuracy, **metrics}

    @staticmethod
    def _unit(x_BE: Tensor) -> Tensor:
        return normalize(x_BE.float(), dim=-1)
