"""A loss or gradient that is not finite on one rank: no rank updates anything, under any ZeRO stage."""

import math

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_sharded_state import VARIANTS, Odd, decay_groups
from torch import nn

from mug.run.cluster.losses import total_loss
from mug.run.state.sharded_state import adam_steps, engine_digests
from mug.run.training.engine import build_engine
from mug.run.training.recipe import TrainerConfig


class Poisonable(Odd):
    """In the first of two micro-batches on the last rank, the loss or only its gradient can be spoilt."""

    zero3_leaves = (nn.Sequential,)
    loss, gradient = 0.0, 0.0  # what is added to the one or the other

    def forward(self, tokens):
        hidden = self.middle(self.embed(tokens)) * self.scale
        if self.gradient and hidden.requires_grad:
            hidden.register_hook(lambda values: values + self.gradient)
        return self.head(hidden).float().logsumexp(-1).mean() + self.loss


def build(stage: str, bf16: bool, clipping: float):
    torch.manual_seed(0)
    zero = {"stage": int(stage[0]), "stage3_param_persistence_threshold": 10}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": clipping,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True, "fused": True}},
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
    }
    if "fp32" in stage:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if "offloaded" in stage:
        zero["offload_optimizer"] = zero["offload_param"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    model = Poisonable()
    return build_engine(model, config, TrainerConfig(), decay_groups(model))


def step(engine, loss: float = 0.0, gradient: float = 0.0) -> bool:
    """Train on two micro-batches; whether the engine says that it has updated the weights."""
    for first in (True, False):
        poison = first and dist.get_rank() == dist.get_world_size() - 1
        engine.module.loss, engine.module.gradient = (loss, gradient) if poison else (0.0, 0.0)
        value = engine(torch.tensor([engine.global_rank, 5]))
        engine.backward(total_loss({"x": value}, {"x": 1.0}, {"x": torch.tensor(1.0)}))
        engine.step()
    return engine.was_step_applied()


def check(rank: int, world: int) -> None:
    for clipping, (stage, bf16) in enumerate(VARIANTS):
        engine = build(stage, bf16, clipping=float(clipping % 2))
        assert step(engine) and adam_steps(engine) == 1, f"{stage}, bf16 {bf16}"
        for poison in ({"loss": math.nan}, {"loss": math.inf}, {"gradient": math.inf}, {"gradient": math.nan}):
            before = engine_digests(engine), adam_steps(engine)
            assert not step(engine, **poison), f"{stage}, bf16 {bf16}, {poison}"
            assert (engine_digests(engine), adam_steps(engine)) == before, f"{stage}, bf16 {bf16}, {poison}"
            assert step(engine), f"{stage}, bf16 {bf16}: nothing is left of {poison}"
            assert engine_digests(engine) != before[0]


@pytest.mark.slow
def test_nothing_is_updated_on_any_rank():
    """Loss or gradient, NaN or infinite, in one of two micro-batches of one of two ranks; then all is as before."""
    run_ranks(check, 2)
