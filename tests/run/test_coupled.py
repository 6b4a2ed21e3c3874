"""Coupled losses over ranks, accumulation and ZeRO stages: one process with the entire batch is the oracle."""

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import run_gloo_ranks
from test_curves import weights_of
from torch import nn
from torch.nn.functional import normalize

from mug.model.batch_norm import BatchNorm, batch_norm_state
from mug.model.contrastive import LogitScale, pair_loss
from mug.model.objectives.objective import Context, CoupledObjective
from mug.run.cluster.coupled import held_out_losses
from mug.run.cluster.losses import WeightedMeans
from mug.run.training.step import train_step

GROUP, GROUPS, WIDTH = 16, 2, 16
WEIGHTS = {"contrastive": 1.0, "own": 0.5}
RATE, STEPS = 0.2, 5


class Block(nn.Module):
    """A ZeRO-3 leaf."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Pairs(CoupledObjective):
    """Two towers, a head with batch norms, a learned scale, a token that the objective owns itself, and a loss of each
    sample's own. Samples that are not `valid` have no caption, and batches without `text` no pairs."""

    losses = WEIGHTS
    zero3_leaves = (Block,)

    def __init__(self):
        super().__init__(None, Context())
        self.token = nn.Parameter(torch.linspace(-0.1, 0.1, WIDTH))
        self.image, self.text = (nn.Sequential(nn.Linear(12, WIDTH), Block(), Block()) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(WIDTH, 8, bias=False), BatchNorm(8), nn.Tanh(), nn.Linear(8, 6))
        self.guess = nn.Linear(WIDTH, 3)
        self.scale = LogitScale(5.0)

    def counts(self, batch):
        if "text" not in batch:
            return {"own": 3 * len(batch["image"])}
        return {"contrastive": int(batch["valid"].sum()), "own": 3 * len(batch["image"])}

    def features(self, batch):
        batch = {name: x.to(self.token.dtype) if x.is_floating_point() else x for name, x in batch.items()}
        image = self.image(batch["image"]) + self.token
        if "text" not in batch:
            return {}, image
        return {"image": image, "text": self.text(batch["text"]), "valid": batch["valid"]}, image

    def coupled_losses(self, features):
        image, text = (normalize(self.head(features[name]).float(), dim=1) for name in ("image", "text"))
        loss, accuracy = pair_loss(image, text, self.scale(), features["valid"])
        return {"contrastive": loss}, {"accuracy/contrastive": accuracy}

    def own_losses(self, batch, rest):
        return {"own": (self.guess(rest).float() - batch["image"][:, :3]).square().mean()}, {}


def make() -> Pairs:
    torch.manual_seed(1)
    return Pairs()


def group_of(step: int, index: int) -> dict[str, torch.Tensor]:
    """The samples of a group; the second of a global batch are images alone in odd steps."""
    generator = torch.Generator().manual_seed(10 * step + index)
    image = torch.randn(GROUP, 12, generator=generator)
    text = image + torch.randn(GROUP, 12, generator=generator)
    valid = torch.rand(GROUP, generator=generator) < 0.8
    return {"image": image} if index % 2 and step % 2 else {"image": image, "text": text, "valid": valid}


def micro_batches(step: int, rank: int, world: int, accumulation: int, groups: int = GROUPS):
    """This rank's: each group by itself, of which a rank takes every `world`-th sample."""
    size = GROUP // (world * accumulation)
    return [
        {name: values[rank::world][i * size : (i + 1) * size] for name, values in group_of(step, index).items()}
        for index in range(groups)
        for i in range(accumulation)
    ]


def oracle() -> dict:
    """Plain PyTorch, the groups of a step whole: each step's metrics, the first's gradients; at the end statistics, and
    metrics of a group held out."""
    model = make()
    found = {"metrics": []}
    for step in range(STEPS):
        groups = [group_of(step, index) for index in range(GROUPS)]
        counts, total, metrics = [model.counts(group) for group in groups], 0, {}
        for group, count in zip(groups, counts, strict=True):
            losses, reported = model(group)
            for name, value in [*((f"loss/{name}", loss) for name, loss in losses.items()), *reported.items()]:
                loss = name.partition("/")[2]
                part = value * count[loss] / sum(other.get(loss, 0) for other in counts)
                metrics[name] = metrics.get(name, 0) + part.item()
                if name.startswith("loss/"):
                    total = total + WEIGHTS[loss] * part
        model.zero_grad()
        total.backward()
        if step == 0:
            found["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
        found["metrics"].append({"loss/total": total.item(), **metrics})
    losses, reported = model.eval()(group_of(STEPS, 0))
    found["held_out"] = {f"loss/{name}": loss.item() for name, loss in losses.items()} | {
        name: value.item() for name, value in reported.items()
    }
    return found | {"statistics": batch_norm_state(model)}


def build(model: nn.Module, stage: int, micro_batch: int, accumulation: int, bf16: bool = False):
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False)
    if stage == 3:
        set_z3_leaf_modules(model, list(model.zero3_leaves))
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
    }
    return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


def assert_is_the_oracle(cases: list[tuple[int, int]], expected: dict) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for stage, accumulation in cases:
        case = f"ZeRO {stage}, {world} rank(s), accumulation {accumulation}"
        model, before = make(), dict(make().named_parameters())
        engine = build(model, stage, GROUP // (world * accumulation), accumulation * GROUPS)
        for step in range(STEPS):
            batches = micro_batches(step, rank, world, accumulation)
            metrics = train_step(engine, batches, WEIGHTS, groups=GROUPS).reduce(WEIGHTS)
            assert metrics == pytest.approx(expected["metrics"][step], abs=1e-4), f"{case}, step {step}"
            if step == 0:
                for name, weight in weights_of(engine).items():
                    true = expected["gradients"][name]
                    wrong = (before[name].detach() - weight) / RATE - true
                    bound = 1e-5 * true.norm() + 2e-6  # rounding of weights, where the gradient is near 0
                    assert wrong.norm() < bound, f"{case}: {name} {wrong.norm() / true.norm():.1e}"
        torch.testing.assert_close(batch_norm_state(model), expected["statistics"], rtol=1e-4, atol=1e-4)
        means = WeightedMeans()
        engine.eval()
        held_out = [(batch, model.counts(batch)) for batch in micro_batches(STEPS, rank, world, accumulation, groups=1)]
        for outcome in held_out_losses(engine, held_out):
            means.add(*outcome)
        metrics = means.reduce(WEIGHTS)
        del metrics["loss/total"]
        assert metrics == pytest.approx(expected["held_out"], abs=1e-4), f"{case}, held out"


def assert_bf16_is_near(expected: dict) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for stage in (1, 3):
        engine = build(make(), stage, GROUP // (world * 2), 2 * GROUPS, bf16=True)
        for step in range(2):
            metrics = train_step(engine, micro_batches(step, rank, world, 2), WEIGHTS, groups=GROUPS).reduce(WEIGHTS)
            for name in ("loss/contrastive", "loss/own"):
                assert metrics[name] == pytest.approx(expected["metrics"][step][name], rel=0.02), f"ZeRO {stage} {name}"


GRID = list(itertools.product((0, 1, 2, 3), (1, 2, 4)))  # ZeRO stage, accumulation
COVERING = {1: [(0, 4), (3, 1)], 2: [(0, 1), (1, 2), (2, 4), (3, 2)]}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_losses_and_gradients_are_those_of_the_entire_group(world):
    run_gloo_ranks(world, assert_is_the_oracle, COVERING[world], oracle())


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_the_entire_group_on_four_ranks():
    run_gloo_ranks(4, assert_is_the_oracle, [(1, 1), (2, 2), (3, 4)], oracle())


@pytest.mark.slow
def test_in_bf16_the_losses_are_near():
    run_gloo_ranks(2, assert_bf16_is_near, oracle())


if __name__ == "__main__":  # the entire grid: python tests/run/test_coupled.py
    for ranks in (1, 2, 4):
        run_gloo_ranks(ranks, assert_is_the_oracle, GRID, oracle())
        print(f"{ranks} rank(s): all of {len(GRID)} cases", flush=True)
