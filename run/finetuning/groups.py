"""The optimizer's groups of parameters: layer-wise learning rates (ELECTRA, BEiT), as MAE fine-tunes."""

from typing import Any

from mug.model.classifier import Classifier, layer_of
from mug.run.training.engine import decays


def layer_decay_groups(model: Classifier, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Two groups a layer, with weight decay and without.

    `lr_scale` of a layer is `layer_decay` to the power of its distance from the head: 1 there.
    """
    last = model.config.depth + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        key = layer_of(name, model.config.depth), decays(name, parameter)
        if key not in groups:
            decay = weight_decay if key[1] else 0.0
            groups[key] = {"params": [], "weight_decay": decay, "lr_scale": layer_decay ** (last - key[0])}
        groups[key]["params"].append(parameter)
    return list(groups.values())
