"""The DeepSpeed engine around an objective."""

import os
import shutil
from typing import Any

import torch

from mug.model.activation_checkpointing import activation_checkpointing
from mug.model.compiled import BACKEND, compile_blocks
from mug.model.objectives.objective import Objective
from mug.run.cluster import hardware
from mug.run.common.errors import RunError
from mug.run.state.averages import build_averages
from mug.run.state.sharded_state import fill_masters
from mug.run.training.apex import fuse_layer_norms, fused_adam
from mug.run.training.deepspeed_config import RecipeValues
from mug.run.training.recipe import TrainerConfig

EPS = 1e-8  # AdamW's


def recipe_values(trainer: TrainerConfig, width: int, world: int) -> RecipeValues:
    """What the "auto" values of a DeepSpeed JSON become, from the recipe."""
    return RecipeValues(
        global_batch=trainer.global_batch,
        micro_batch=trainer.micro_batch,
        world_size=world,
        gradient_clipping=trainer.gradient_clipping,
        bf16=hardware.is_bf16(trainer.precision),
        learning_rate=trainer.learning_rate,
        betas=tuple(trainer.betas),
        eps=EPS,
        weight_decay=trainer.weight_decay,
        width=width,
    )


def check_compiler(trainer: TrainerConfig) -> None:
    """Raise RunError if trainer.compile is set without a C++ compiler, which it needs on any device."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if trainer.compile and BACKEND == "inductor" and not any(map(shutil.which, compilers)):
        raise RunError(
            "trainer.compile needs a C++ compiler: install g++, name one in $CXX, or leave trainer.compile out"
        )


def build_engine(
    model: Objective, ds_config: dict[str, Any], trainer: TrainerConfig, groups: list[dict[str, Any]]
) -> Any:
    """deepspeed.initialize on the model; under ZeRO-3 each block is gathered as a unit.

    groups: see `mug.run.training.groups`. The optimizer is what the DeepSpeed JSON names, unless the recipe asks for
    apex's.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    check_state(model)
    if ds_config.get("zero_optimization", {}).get("stage") == 3:
        set_z3_leaf_modules(model, list(model.zero3_leaves))
    if trainer.apex_layer_norm:
        fuse_layer_norms(model)
    activation_checkpointing(model, trainer.activation_checkpointing)
    if trainer.compile:
        compile_blocks(model)
    drawn = {name: parameter.detach() for name, parameter in model.named_parameters()}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=fused_adam(groups, trainer, EPS) if trainer.apex_adam else None,
        model_parameters=groups,
        config=ds_config,
        dist_init_required=False,
    )
    engine.averages = build_averages(engine, drawn)
    if engine.bfloat16_enabled():
        fill_masters(engine, drawn)
        if engine.zero_optimization_stage() == 0:  # DeepSpeed has taken an empty step there, which AdamW would count
            engine.basic_optimizer.state.clear()
    if engine.optimizer is engine.basic_optimizer:  # stage 0 in fp32
        engine.optimizer.register_step_pre_hook(_skip_nonfinite_step)
    return engine


def check_state(model: Objective) -> None:
    """Refuse a model with state that checkpoints do not hold: they hold its parameters and its extra state.

    Raises:
        RunError: a persistent buffer, such as a batch norm's statistics, which bf16 would also round.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = [name for name in model.state_dict() if name not in parameters and name not in model.extra_state()]
    if buffers:
        raise RunError(
            f"checkpoints do not save the buffer {buffers[0]} ({len(buffers)} in all): return it from extra_state, or"
            " register it with persistent=False, if it can be computed again"
        )


def _skip_nonfinite_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Skip the step as DeepSpeed's own optimizers do: without gradients AdamW does nothing; mark it in the engine."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    optimizer.overflow = not norm.isfinite().item()
    if optimizer.overflow:
        optimizer.zero_grad(set_to_none=True)


def set_learning_rate(engine: Any, learning_rate: float, peak: float) -> None:
    """Set the learning rate, or `peak` where it is constant, times the `lr_scale` of those groups that have one."""
    for group in engine.optimizer.param_groups:
        group["lr"] = (peak if group.get("lr_constant") else learning_rate) * group.get("lr_scale", 1.0)


@torch.no_grad()
def gather_state_dict(engine: Any) -> dict[str, torch.Tensor]:
    """Returns the current weights, fp32 on this rank's device, on all ranks; one parameter at a time is gathered."""
    import deepspeed

    weights = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().float().clone()
    return weights


def whole_copy(engine: Any) -> Objective:
    """Returns the objective with all its weights, fp32, in eval mode on this rank's device: a collective call."""
    trained: Objective = engine.module
    weights = gather_state_dict(engine)
    copy = type(trained)(trained.config, trained.context).to(hardware.device())
    copy.load_state_dict(weights)
    copy.load_extra_state(trained.extra_state())
    return copy.eval()
