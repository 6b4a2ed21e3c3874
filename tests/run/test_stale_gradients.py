"""Parameters that some micro-batches do not use: plain PyTorch is the oracle of the steps, in every ZeRO stage."""

import pytest
import torch
from ranks import run_ranks
from torch import nn

from mug.model.objectives.objective import Context, Objective
from mug.run.training import step as training_step
from mug.run.training.step import train_step

RATE, WORLD, B = 0.5, 2, 4
# Which of the two micro-batches of each step use the decoder.
STEPS = [(True, False), (False, True), (False, True), (False, False), (True, True), (False, True)]
STAGES = [(0, {}), (1, {}), (2, {}), (3, {}), (3, {"offload_optimizer": {"device": "cpu"}})]


class TwoTasks(Objective):
    """An encoder that all batches use, and a decoder that some do."""

    losses = {"encode": 1.0, "decode": 1.0}  # noqa: RUF012

    def __init__(self):
        super().__init__(None, Context())
        self.encoder, self.decoder = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def counts(self, batch):
        return {"decode" if "decode" in batch else "encode": len(batch["x"])}

    def forward(self, batch):
        encoded = self.encoder(batch["x"])
        if "decode" in batch:
            return {"decode": (self.decoder(encoded) - batch["x"]).square().mean()}, {}
        return {"encode": encoded.square().mean()}, {}


def make() -> TwoTasks:
    torch.manual_seed(0)
    return TwoTasks()


def batches_of(step: int) -> list[dict[str, torch.Tensor]]:
    """The two micro-batches of a step, of all ranks."""
    x = torch.randn(2, WORLD * B, 6, generator=torch.Generator().manual_seed(step))
    return [{"x": x[i]} | ({"decode": torch.ones(WORLD * B)} if uses else {}) for i, uses in enumerate(STEPS[step])]


def oracle() -> list[dict[str, torch.Tensor]]:
    """Weights after each step."""
    model, found = make(), []
    for step, uses in enumerate(STEPS):
        model.zero_grad()
        for batch in batches_of(step):
            (loss,) = model(batch)[0].values()
            (loss / uses.count("decode" in batch)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0 if parameter.grad is None else RATE * parameter.grad
        found.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    return found


def run(stage: int, zero: dict, rank: int):
    """Weights after each step, as the trainer makes it."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=(model := make()),
        model_parameters=list(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": B,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
        dist_init_required=False,
    )
    for step in range(len(STEPS)):
        batches = [{name: values[rank::WORLD] for name, values in batch.items()} for batch in batches_of(step)]
        train_step(engine, batches, TwoTasks.losses)
        weights = {}
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
        yield weights


def assert_is_the_oracle(rank: int, world: int, expected: list[dict[str, torch.Tensor]]) -> None:
    for stage, zero in STAGES:
        for step, (weights, true) in enumerate(zip(run(stage, zero, rank), expected, strict=True)):
            for name, weight in weights.items():
                case = f"ZeRO {stage} {zero}, step {step}, {name}"
                torch.testing.assert_close(weight, true[name], rtol=1e-5, atol=1e-6, msg=lambda m, c=case: f"{c}: {m}")


def assert_deepspeed_alone_is_not(rank: int, world: int, expected: list[dict[str, torch.Tensor]]) -> None:
    """When this fails, DeepSpeed clears them itself, and mug.run.training.stale_gradients can go."""
    training_step.clear_gradients = lambda engine: None
    last = list(run(3, {}, rank))[-1]
    assert not torch.allclose(last["decoder.0.weight"], expected[-1]["decoder.0.weight"], rtol=1e-3)


@pytest.mark.slow
def test_a_parameter_gets_the_gradient_of_the_micro_batches_that_use_it():
    run_ranks(assert_is_the_oracle, WORLD, oracle())


@pytest.mark.slow
def test_deepspeed_still_keeps_gradients_of_the_step_before():
    run_ranks(assert_deepspeed_alone_is_not, WORLD, oracle())
