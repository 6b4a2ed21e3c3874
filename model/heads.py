"""Projection and prediction heads of joint-embedding methods, and how far their outputs have collapsed.

Dimension letters: B batch, D width, E size of an output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mug.model.batch_norm import BatchNorm
from mug.model.contrastive import gather, rank_and_world
from mug.model.encoder import Encoder
from mug.model.presets import EncoderConfig, ModelConfigError, at_least


@dataclass(frozen=True)
class ProjectorConfig(EncoderConfig):
    """Sizes of a projection head on the class token, and the crops whose outputs it compares.

    Args:
        projector_width: width of the projector's hidden layers.
        projection_width: size of its output.
        view_scale: min and max share of an image's area that a view covers; `data.crop_scale` is refused.
    """

    projector_width: int = 4096
    projection_width: int = 256
    view_scale: tuple[float, float] = (0.08, 1.0)

    def check(self) -> None:
        super().check()
        at_least(self, 1, "projector_width", "projection_width")
        check_scale(self, "view_scale")

    @property
    def projector_widths(self) -> tuple[int, ...]:
        """Returns the widths of three layers, from the encoder's to the output's."""
        return self.width, self.projector_width, self.projector_width, self.projection_width


def check_scale(config: EncoderConfig, name: str) -> None:
    """Raise ModelConfigError unless the setting is a min and a max share."""
    low, high = getattr(config, name)
    if not 0 < low <= high <= 1:
        raise ModelConfigError(f"model.{name} must be a min and a max in (0, 1], not {low}, {high}")


def projector(widths: Sequence[int], last_norm: bool = True) -> nn.Sequential:
    """An MLP, [B, widths[0]] to [B, widths[-1]], as in SimCLR v2 and MoCo v3 (arXiv 2104.02057, section 4).

    Each layer but the last is linear without bias, and followed by batch norm and ReLU.

    last_norm: whether a batch norm without weight and bias follows the last layer, which has a bias otherwise.
    """
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(widths), start=1):
        last = i == len(widths) - 1
        layers.append(nn.Linear(before, after, bias=last and not last_norm))
        if not last:
            layers += [BatchNorm(after), nn.ReLU()]
        elif last_norm:
            layers.append(BatchNorm(after, affine=False))
    return nn.Sequential(*layers)


def class_tokens(encoder: Encoder, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the class token [B, D] of each view, of images [B, 3, S, S] that are alike in dtype; one call encodes
    all."""
    return encoder(torch.cat(list(views)))[:, 0].chunk(len(views))


@torch.no_grad()
def spread(output_BE: Tensor) -> dict[str, Tensor]:
    """Returns metrics of how the outputs of all ranks are spread, by which a collapse shows: fp32 scalars.

    `std`: the mean deviation of a coordinate times √E, 1 where directions are uniform and 0 where outputs are equal
    (SimSiam, arXiv 2011.10566, section 4.1). `rank`: in how many directions they vary, (Σλ)² / Σλ² of the eigenvalues
    λ of their covariance. A collective call.

    Args:
        output_BE: of unit length; every rank has as many.
    """
    with torch.autocast(output_BE.device.type, enabled=False):
        x_BE = output_BE.float()
        centred_BE = x_BE - _mean_over_ranks(x_BE.mean(0))
        if len(x_BE) * rank_and_world()[1] < x_BE.shape[1]:  # N x N products have the same eigenvalues as E x E
            centred_NE = gather(centred_BE)
            variance_E = centred_NE.square().mean(0)
            products = centred_NE @ centred_NE.T / len(centred_NE)
        else:
            products = _mean_over_ranks(centred_BE.T @ centred_BE / len(x_BE))
            variance_E = products.diagonal()
        return {
            "std": variance_E.sqrt().mean() * len(variance_E) ** 0.5,
            "rank": products.trace().square() / products.square().sum().clamp(min=1e-30),
        }


def _mean_over_ranks(x: Tensor) -> Tensor:
    """Returns the mean of all ranks' `x`, which it overwrites. A collective call."""
    world = rank_and_world()[1]
    if world > 1:
        dist.all_reduce(x)
    return x / world
