"""Models that leave the neutral start of their parameters."""

import torch
from torch import nn


def noisy(model: nn.Module, alpha: float = 0.05) -> nn.Module:
    """The model with noise on every parameter, so that each matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=alpha)
    return model
