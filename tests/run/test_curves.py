"""The curve of every objective on image-text pairs is the same for any ranks, accumulation and ZeRO stage.

The oracle is plain PyTorch in one process, with the entire batch at once. The tests take two cases of each objective,
which cover all settings over the objectives. All 36 cases: PYTHONPATH=tests python tests/run/test_curves.py [NAME …]
"""

import dataclasses
import itertools
import sys

import pytest
import torch
import torch.distributed as dist
from ranks import run_gloo_ranks
from torch import nn

from mug.model.objectives.objective import Context, Objective, find_objective, objective_names
from mug.model.presets import Vocabulary, resolve
from mug.run.state.averages import update_teachers
from mug.run.training.engine import build_engine, set_learning_rate
from mug.run.training.groups import parameter_groups
from mug.run.training.recipe import TrainerConfig
from mug.run.training.step import train_step

NAMES = [name for name in objective_names() if find_objective(name).kinds == ("pairs",)]
CONTEXT = Context(seed=3, vocabulary=Vocabulary(size=30, pad=0, bos=1, eos=2, mask=3))
SIZES = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "heads": 2}
SIZES |= {"pixel_width": 32, "pixel_depth": 1, "pixel_heads": 2, "text_width": 32, "text_heads": 2, "text_length": 8}
SIZES |= {"text_unimodal_layers": 1, "text_cross_layers": 1, "text_layers": 1, "embedding_width": 16}
SIZES |= {"projector_width": 32, "projection_width": 16, "predictor_width": 24}
SAMPLES, STEPS, RATE = 16, 20, 1e-3
EPS = 1e-6  # of Adam: gradients that are 0 but for rounding, as of a bias before a batch norm, move nothing
STEPS_OF_TESTS = 5
WORLDS, STAGES, ACCUMULATIONS = (1, 2, 4), (0, 1, 2, 3), (1, 2, 4)

Case = tuple[int, int]  # ZeRO stage, accumulation
ALL = list(itertools.product(STAGES, ACCUMULATIONS))


def numbered_case(k: int) -> tuple[int, Case]:
    """The number of ranks, and the case: 36 in a row are all there are, and 12 every pair of two settings."""
    return WORLDS[k % 3], (STAGES[k % 4], ACCUMULATIONS[(k // 4 + k // 12) % 3])


def cases_of_tests(world: int) -> dict[str, list[Case]]:
    """Of each objective, those of its two cases that have this number of ranks."""
    pairs = {name: [numbered_case(2 * i), numbered_case(2 * i + 1)] for i, name in enumerate(NAMES)}
    found = {name: [case for ranks, case in pair if ranks == world] for name, pair in pairs.items()}
    return {name: cases for name, cases in found.items() if cases}


def make(name: str, sizes: dict = SIZES, context: Context = CONTEXT) -> Objective:
    """A small objective: of the sizes, those that it has."""
    objective = find_objective(name)
    known = {field.name for field in dataclasses.fields(objective.Config)}
    config = resolve(objective.Config(**{size: value for size, value in sizes.items() if size in known}))
    torch.manual_seed(0)
    return objective(config, context)


def image_at(position: int, view: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(position + 100_000 * view)
    return torch.randint(0, 256, (3, 16, 16), generator=generator, dtype=torch.uint8)


def batch_at(positions: range, views: int = 0) -> dict[str, torch.Tensor]:
    """Samples by their positions alone; each fifth has no caption, and those of the others differ in length."""
    tokens_BT = torch.zeros(len(positions), SIZES["text_length"], dtype=torch.int64)
    for tokens_T, position in zip(tokens_BT, positions, strict=True):
        if position % 5:
            words = torch.randint(4, 30, (1 + position % 5,), generator=torch.Generator().manual_seed(position))
            caption = torch.cat([torch.tensor([1]), words, torch.tensor([2])])
            tokens_T[: len(caption)] = caption
    if views:
        pixels = {"views": torch.stack([torch.stack([image_at(p, v) for v in range(views)]) for p in positions])}
    else:
        pixels = {"image": torch.stack([image_at(p) for p in positions])}
    return {**pixels, "tokens": tokens_BT, "position": torch.tensor(list(positions))}


def batch_of(model: Objective, positions: range) -> dict[str, torch.Tensor]:
    return batch_at(positions, len(model.views(model.config)))


@torch.no_grad()
def move_teachers(model: Objective, step: int) -> None:
    """What update_teachers does, in plain PyTorch."""
    for teacher, student in model.teachers.items():
        m = model.momentum_at((step + 1) / STEPS)
        pairs = zip(model.get_submodule(teacher).parameters(), model.get_submodule(student).parameters(), strict=True)
        for average, weight in pairs:
            average.mul_(m).add_(weight, alpha=1 - m)


def teachers_of(parameters: dict[str, torch.Tensor], model: Objective) -> dict[str, torch.Tensor]:
    names = tuple(f"{teacher}." for teacher in model.teachers)
    return {name: tensor for name, tensor in parameters.items() if name.startswith(names)}


def expected(name: str, steps: int) -> dict:
    """Losses of all steps, and the gradient of every parameter at the first, in plain PyTorch; the teachers at last."""
    model, found = make(name), {"losses": []}
    groups = parameter_groups(model, TrainerConfig())
    for group in groups:
        group["lr"] = RATE * group["lr_scale"]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=EPS)
    for step in range(steps):
        losses, _ = model(batch_of(model, range(step * SAMPLES, (step + 1) * SAMPLES)))
        total = sum(model.losses[loss] * value for loss, value in losses.items())
        optimizer.zero_grad()
        total.backward()
        if step == 0:
            found["gradients"] = {of: gradient_of(parameter) for of, parameter in model.named_parameters()}
        optimizer.step()
        move_teachers(model, step)
        model.after_step((step + 1) * SAMPLES)
        found["losses"].append(total.item())
    return found | {"teachers": teachers_of({of: p.detach() for of, p in model.named_parameters()}, model)}


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def engine_of(model: Objective, micro_batch: int, accumulation: int, optimizer: dict, stage: int, **zero: object):
    """DeepSpeed's engine around the model, in a process of `run_gloo_ranks`."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False)
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        "optimizer": optimizer,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    trainer = TrainerConfig(weight_decay=0.05 if optimizer["type"] == "AdamW" else 0.0)
    return build_engine(model, config, trainer, parameter_groups(model, trainer))


def build(name: str, case: Case, optimizer: dict):
    stage, accumulation = case
    micro_batch = SAMPLES // (dist.get_world_size() * accumulation)
    return engine_of(make(name), micro_batch, accumulation, optimizer, stage)


def micro_batches(model: Objective, step: int, accumulation: int) -> list[dict[str, torch.Tensor]]:
    """Those of this rank: each R-th position of the step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = range(step * SAMPLES + rank, (step + 1) * SAMPLES, world)
    size = len(mine) // accumulation
    return [batch_of(model, mine[i : i + size]) for i in range(0, len(mine), size)]


@torch.no_grad()
def weights_of(engine) -> dict[str, torch.Tensor]:
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def assert_is_the_oracle(cases: dict[str, list[Case]], oracles: dict[str, dict]) -> None:
    for name, case in [(name, case) for name, of_name in cases.items() for case in of_name]:
        what = f"{name}, ZeRO {case[0]}, {dist.get_world_size()} rank(s), accumulation {case[1]}"
        assert_trains_alike(name, case, oracles[name], what)
        assert_gradients_are_equal(name, case, oracles[name], what)


def assert_trains_alike(name: str, case: Case, oracle: dict, what: str) -> None:
    adam = {"lr": RATE, "betas": [0.9, 0.95], "eps": EPS, "torch_adam": True}
    engine = build(name, case, {"type": "AdamW", "params": adam})
    model, losses = engine.module, []
    for step in range(len(oracle["losses"])):
        set_learning_rate(engine, RATE, RATE)
        means = train_step(engine, micro_batches(model, step, case[1]), model.losses)
        update_teachers(engine, (step + 1) / STEPS)
        model.after_step((step + 1) * SAMPLES)
        losses.append(means.reduce(model.losses)["loss/total"])
    assert losses == pytest.approx(oracle["losses"], abs=1e-4), what
    for teacher, weight in teachers_of(weights_of(engine), model).items():
        assert torch.allclose(weight, oracle["teachers"][teacher], atol=1e-4), f"{what}: {teacher}"


def assert_gradients_are_equal(name: str, case: Case, oracle: dict, what: str) -> None:
    engine = build(name, case, {"type": "SGD", "params": {"lr": 1.0}})
    before = weights_of(engine)
    train_step(engine, micro_batches(engine.module, 0, case[1]), engine.module.losses)
    for parameter, after in weights_of(engine).items():
        found, gradient = before[parameter] - after, oracle["gradients"][parameter]
        bound = 1e-5 * gradient.norm() + 2e-7 * gradient.numel() ** 0.5  # rounding of weights, where it is near 0
        assert (found - gradient).norm() < bound, f"{what}: the gradient of {parameter}"


def test_the_cases_cover_all_settings():
    dozen = [numbered_case(k) for k in range(12)]
    settings = [(world, *case) for world, case in dozen]
    for a, b in itertools.combinations(zip(*settings, strict=True), 2):
        assert len({*zip(a, b, strict=True)}) == len({*a}) * len({*b}), "every pair of two settings"
    assert len({numbered_case(k) for k in range(36)}) == 36
    assert sum(len(pair) for world in WORLDS for pair in cases_of_tests(world).values()) == 2 * len(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_losses_and_gradients_are_those_of_the_entire_batch(world):
    cases = cases_of_tests(world)
    run_gloo_ranks(world, assert_is_the_oracle, cases, {name: expected(name, STEPS_OF_TESTS) for name in cases})


if __name__ == "__main__":
    names = sys.argv[1:] or NAMES
    for ranks in WORLDS:
        run_gloo_ranks(ranks, assert_is_the_oracle, dict.fromkeys(names, ALL), {n: expected(n, STEPS) for n in names})
        sys.stdout.write(f"{ranks} rank(s): {', '.join(names)} over {len(ALL)} cases each agree\n")
