"""The optimizer's groups of parameters: weight decay, layer-wise learning rates (ELECTRA, BEiT, MAE), and parts with
a learning rate of their own, or frozen."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mug.model.objectives.objective import Objective
from mug.run.state.initial import check_part
from mug.run.training.recipe import TrainerConfig

NO_DECAY = ("cls_token", "mask_token", "position_embed", "positions_ND", "queries")


def parameter_groups(
    model: Objective, trainer: TrainerConfig, rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Returns two groups, with weight decay and without; where layers or parts have rates of their own, two for each.

    `lr_scale` of a layer of the encoder is `trainer.layer_decay` to the power of its distance from what follows the
    encoder, which has 1; that of a part is multiplied by its rate in `rates`, 0 for what the objective freezes: there,
    weight decay is off as well. What learns at a constant rate has `lr_constant`.
    """
    rates = dict.fromkeys(model.frozen, 0.0) | dict(rates or {})
    depth = model.config.depth
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for decayed in (True, False) if trainer.layer_decay == 1 else ():
        groups[1.0, decayed, False] = _group(trainer, 1.0, decayed, False)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = rate_of(name, rates) * trainer.layer_decay ** (depth + 1 - layer_of(name, depth))
        key = scale, scale > 0 and has_weight_decay(name, parameter), _is_of(model.constant_rate, name)
        groups.setdefault(key, _group(trainer, *key))["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _group(trainer: TrainerConfig, scale: float, decayed: bool, constant: bool) -> dict[str, Any]:
    decay = trainer.weight_decay * decayed
    return {"params": [], "weight_decay": decay, "lr_scale": scale, "lr_constant": constant}


def _is_of(modules: Sequence[str], name: str) -> bool:
    """Whether a parameter belongs to one of the modules, by their paths."""
    return any(name.startswith(f"{module}.") for module in modules)


def rate_of(name: str, rates: Mapping[str, float]) -> float:
    """Returns the rate of the innermost part that holds the parameter; 1 where none does."""
    holding = [part for part in rates if f"{name}.".startswith(f"{part}.")]
    return rates[max(holding, key=len)] if holding else 1.0


def freeze(model: Objective, rates: Mapping[str, float]) -> None:
    """Keep gradients from the parts whose rate is 0, so that the norm that is clipped is that of what is trained.

    They stay in the optimizer, and so in checkpoints. Where no input of a frozen part needs a gradient, as images do
    not, its forward pass keeps nothing for backward.

    Raises:
        RunError: the model has no part of such a name.
    """
    for part in rates:
        check_part(model, part, f"rates.{part}")
    modules = dict(model.named_modules())
    for part, module in ((part, modules[part]) for part, rate in rates.items() if rate == 0 and part in modules):
        if all(rate_of(f"{part}.{name}", rates) == 0 for name, _ in module.named_parameters()):
            module.forward = _without_gradient(module.forward)
    for name, parameter in model.named_parameters():
        if rate_of(name, rates) == 0:
            parameter.register_hook(torch.zeros_like)


def _without_gradient(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `forward` without a graph for calls none of whose arguments needs a gradient."""

    def run(*args: Any, **options: Any) -> Any:
        needed = any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *options.values()))
        with torch.set_grad_enabled(needed and torch.is_grad_enabled()):
            return forward(*args, **options)

    return run


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter: not to norms, biases, tokens and positions."""
    return parameter.ndim > 1 and not name.endswith(NO_DECAY)


def layer_of(name: str, depth: int) -> int:
    """Returns a parameter's layer: 0 for what comes before the encoder's blocks, depth + 1 for what follows them."""
    if name.startswith(("encoder.cls_token", "encoder.positions_ND", "encoder.patch_embed.")):
        return 0
    return 1 + int(name.split(".")[2]) if name.startswith("encoder.blocks.") else depth + 1
