"""The DeepSpeed engine around an objective."""

from typing import Any

import torch
from torch import nn

from mug.model.recompute import recompute
from mug.run.training.apex import fuse_layer_norms, fused_adam
from mug.run.training.deepspeed_config import RecipeValues
from mug.run.training.recipe import TrainerConfig

EPS = 1e-8  # AdamW's
NO_DECAY = ("cls_token", "mask_token", "position_embed", "positions_ND")


def recipe_values(trainer: TrainerConfig, width: int, world: int) -> RecipeValues:
    """What the "auto" values of a DeepSpeed JSON become: bf16 on GPUs, fp32 on CPUs, the rest from the recipe."""
    return RecipeValues(
        global_batch=trainer.global_batch,
        micro_batch=trainer.micro_batch,
        world_size=world,
        gradient_clipping=trainer.gradient_clipping,
        bf16=torch.cuda.is_available(),
        learning_rate=trainer.learning_rate,
        betas=tuple(trainer.betas),
        eps=EPS,
        weight_decay=trainer.weight_decay,
        width=width,
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, with weight decay; norms, biases, tokens and positions, without."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[decays(name, parameter)].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay shrinks it: not norms, biases, tokens and positions."""
    return parameter.ndim > 1 and not name.endswith(NO_DECAY)


def build_engine(
    model: nn.Module, ds_config: dict[str, Any], trainer: TrainerConfig, groups: list[dict[str, Any]] | None = None
) -> Any:
    """deepspeed.initialize on the model; under ZeRO-3 each block is gathered as a whole.

    groups: of the model's parameters, where they are not those of `parameter_groups`. The optimizer is what the
    DeepSpeed JSON names, unless the recipe asks for apex's.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    if ds_config.get("zero_optimization", {}).get("stage") == 3:
        set_z3_leaf_modules(model, model.zero3_leaves)
    if trainer.apex_layer_norm:
        fuse_layer_norms(model)
    recompute(model, trainer.recompute)
    groups = groups or parameter_groups(model, trainer.weight_decay)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=fused_adam(groups, trainer, EPS) if trainer.apex_adam else None,
        model_parameters=groups,
        config=ds_config,
        dist_init_required=False,
    )
    if engine.optimizer is engine.basic_optimizer:  # stage 0 in fp32
        engine.optimizer.register_step_pre_hook(_hold_back_what_is_not_finite)
    return engine


def _hold_back_what_is_not_finite(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """What DeepSpeed's own optimizers do: without gradients, AdamW does nothing, and the engine is told so."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    optimizer.overflow = not norm.isfinite().item()
    if optimizer.overflow:
        optimizer.zero_grad(set_to_none=True)


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set it, times the `lr_scale` of those groups that have one."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


@torch.no_grad()
def whole_weights(engine: Any) -> dict[str, torch.Tensor] | None:
    """The weights as they are now, on the CPU of rank 0 (None elsewhere); one parameter at a time is gathered."""
    import deepspeed

    weights = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if engine.global_rank == 0:
                weights[name] = parameter.detach().float().cpu().clone()
    return weights if engine.global_rank == 0 else None
