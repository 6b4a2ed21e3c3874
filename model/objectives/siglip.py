"""SigLIP (arXiv 2303.15343): CLIP's two encoders, and for each pair of the group whether it belongs together.

The paper pools the image by attention; here the class token serves, as in CLIP, so that only the loss differs.
"""

import math

import torch
from torch import Tensor, nn

from mug.model.contrastive import LogitScale, sigmoid_loss
from mug.model.objectives.clip import CLIP, CLIPConfig
from mug.model.objectives.objective import Context, Losses, Metrics


class SigLIP(CLIP):
    """Reads what CLIP reads; a sample without caption is in no pair."""

    def __init__(self, config: CLIPConfig, context: Context):
        super().__init__(config, context)
        # The paper's start: most pairs do not belong together, which a bias of -10 knows before the first step.
        self.scale = LogitScale(10.0, maximum=math.inf)
        self.bias = nn.Parameter(torch.tensor([-10.0]))

    def coupled_losses(self, features: dict[str, Tensor]) -> tuple[Losses, Metrics]:
        loss, accuracy = sigmoid_loss(
            features["image"], features["text"], self.scale(), self.bias.float(), features["captioned"]
        )
        return {"contrastive": loss}, {"accuracy/contrastive": accuracy}
