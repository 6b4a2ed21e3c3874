"""NVIDIA's apex, for those who have it: its fused AdamW and layer norm in place of PyTorch's or DeepSpeed's.

It is built from source (docs/kernels.md); the package of that name on PyPI is another one.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mug.run.common.errors import RunError
from mug.run.training.deepspeed_config import offloads
from mug.run.training.recipe import TrainerConfig


def check_apex(trainer: TrainerConfig, ds_config: dict[str, Any]) -> None:
    """Refuse a recipe that asks for what this machine, or this DeepSpeed JSON, does not allow.

    Raises:
        RunError: apex is not installed, or the optimizer's state is in host memory.
    """
    if trainer.apex_layer_norm:
        _module("apex.normalization", "FusedLayerNorm", "trainer.apex_layer_norm")
    if trainer.apex_adam:
        _module("apex.optimizers", "FusedAdam", "trainer.apex_adam")
        if offloads(ds_config.get("zero_optimization", {}), "offload_optimizer"):
            raise RunError("trainer.apex_adam works only on GPUs; remove offload_optimizer from the DeepSpeed JSON")


def _module(name: str, wanted: str, switch: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise RunError(
            f"{switch}: {name} cannot be imported ({error}); docs/kernels.md explains how to build it"
        ) from error
    if not hasattr(module, wanted):
        raise RunError(f"{switch}: {name} has no {wanted}; docs/kernels.md explains how to build NVIDIA's apex")
    return module


def fuse_layer_norms(model: nn.Module) -> None:
    """Put apex's FusedLayerNorm in place of every nn.LayerNorm; weights, names and results stay."""
    fused = _module("apex.normalization", "FusedLayerNorm", "trainer.apex_layer_norm").FusedLayerNorm
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm) is nn.LayerNorm:
                replacement = fused(norm.normalized_shape, eps=norm.eps)
                replacement.weight, replacement.bias = norm.weight, norm.bias
                setattr(parent, name, replacement)


def fused_adam(groups: list[dict[str, Any]], trainer: TrainerConfig, eps: float) -> torch.optim.Optimizer:
    """apex's FusedAdam as AdamW, with the recipe's numbers."""
    module = _module("apex.optimizers", "FusedAdam", "trainer.apex_adam")
    options = {"lr": trainer.learning_rate, "betas": tuple(trainer.betas), "eps": eps}
    return module.FusedAdam(groups, adam_w_mode=True, **options)
