"""State that one number of ranks and ZeRO stage wrote, read by others: DeepSpeed's own view of it is the oracle."""

import hashlib
import itertools
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors import safe_open
from torch import nn

from mug.model.momentum import teacher_of
from mug.model.objectives.objective import Context, Objective
from mug.run.common.errors import RunError
from mug.run.state import checkpoint, sharded_state
from mug.run.state.averages import update_teachers
from mug.run.state.extra_state import copy_extra_state
from mug.run.state.restore import load_engine
from mug.run.state.saver import Saver
from mug.run.state.sharded_state import BLOCK, ParamSlice, SavedState, digest_of, write_pieces
from mug.run.training.engine import build_engine
from mug.run.training.recipe import CheckpointConfig, TrainerConfig

STAGES = {
    False: ["0", "1", "2", "3", "3, offloaded"],
    True: ["0", "1", "1, fp32 gradients", "2", "3", "3, offloaded"],  # in bf16
}
VARIANTS = [(stage, bf16) for bf16, stages in STAGES.items() for stage in stages]


class Odd(Objective):
    """Sizes that no number of ranks divides, a single weight, and one matrix under two names."""

    zero3_leaves = (nn.Sequential,)

    def __init__(self):
        super().__init__(None, Context())
        self.embed = nn.Embedding(11, 7)
        self.middle = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 7))
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.middle(self.embed(tokens)) * self.scale).float().logsumexp(-1).mean()


def decay_groups(model: nn.Module) -> list[dict]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if (parameter.ndim > 1) == decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]


class Complete(Odd):
    """And what the optimizer does not step: a teacher, a frozen layer, and statistics over all ranks."""

    teachers: ClassVar = {"teacher": "middle"}

    def __init__(self):
        super().__init__()
        self.teacher = teacher_of(self.middle)
        self.fixed = nn.Linear(7, 7).requires_grad_(False)
        self.statistics = {"mean": torch.randn(7), "samples": torch.zeros((), dtype=torch.int64)}

    def momentum_at(self, progress: float) -> float:
        return 0.5 + 0.4 * progress

    def extra_state(self):
        return self.statistics

    def load_extra_state(self, state):
        self.statistics = state

    def forward(self, tokens):
        embedded = self.embed(tokens)
        with torch.no_grad():
            target = self.teacher(embedded)
        hidden = self.fixed(self.middle(embedded))
        mean = hidden.detach().float().mean(0)
        dist.all_reduce(mean)
        self.statistics["mean"].lerp_(mean / dist.get_world_size(), 0.1)
        self.statistics["samples"] += len(tokens) * dist.get_world_size()
        return self.head(hidden * self.scale).float().logsumexp(-1).mean() + (hidden - target).float().square().mean()


def build(stage: str, bf16: bool, saved: SavedState | None = None):
    torch.manual_seed(0 if saved is None else 1)
    model = Complete()
    if saved:
        sharded_state.load_weights(model, saved)
    zero = {"stage": int(stage[0]), "stage3_param_persistence_threshold": 10}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True, "fused": True}},
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
    }
    if "fp32" in stage:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if "offloaded" in stage:
        zero["offload_optimizer"] = zero["offload_param"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    return build_engine(model, config, TrainerConfig(), decay_groups(model))


def train(engine, step: int) -> None:
    engine.backward(engine(torch.tensor([(3 * step + engine.global_rank) % 11, 5])))
    engine.step()
    update_teachers(engine, step / 4)


def averages(engine) -> dict[str, np.ndarray]:
    """Whole fp32 averages of the teacher's parameters, put together from what the ranks would save."""
    weights = sharded_state.slices_by_kind(engine, sharded_state.owned_slices(engine))["weight"]
    whole = {}
    for name, parameter in engine.module.teacher.named_parameters(prefix="teacher"):
        whole[name] = torch.zeros(getattr(parameter, "ds_shape", parameter.shape).numel())
        for (owner, start), values in weights.items():
            if owner == name:
                whole[name][start : start + len(values)] = values
        dist.all_reduce(whole[name])
    return {name: values.numpy() for name, values in whole.items()}


def computed_weights(engine) -> dict[str, np.ndarray]:
    """Whole parameters as the model computes with them."""
    import deepspeed

    seen = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            seen[f"computes {name}"] = parameter.detach().float().cpu().numpy().copy()
    return seen


def seen_by_deepspeed(engine) -> dict[str, np.ndarray]:
    """`computed_weights`, and whole fp32 weights and moments of what is trained."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links moments to parameters in its first step, but after the first of two groups.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    seen = {}
    masters = iter(p for group in engine.basic_optimizer.param_groups for p in group["params"])
    by_group = sorted(
        engine.module.named_parameters(), key=lambda named: getattr(named[1], "ds_shape", named[1].shape)[1:] == ()
    )
    for name, parameter in by_group:
        if not parameter.requires_grad:
            continue
        if engine.zero_optimization_stage() == 0:
            master = next(masters)
            seen[f"weight {name}"] = master
            for moment in ("exp_avg", "exp_avg_sq"):
                seen[f"{moment} {name}"] = engine.basic_optimizer.state[master][moment]
        else:
            seen[f"weight {name}"] = safe_get_full_fp32_param(parameter)
            for moment in ("exp_avg", "exp_avg_sq"):
                seen[f"{moment} {name}"] = safe_get_full_optimizer_state(parameter, moment)
    seen = {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in seen.items()}
    return seen | computed_weights(engine)


def write(rank: int, world: int, folder: Path) -> None:
    for number, (stage, bf16) in enumerate(VARIANTS):
        engine = build(stage, bf16)
        seen = train_and_check(engine, bf16)
        seen |= {f"average {name}": values for name, values in averages(engine).items()}
        seen |= {f"extra {name}": value.numpy() for name, value in copy_extra_state(engine.module).items()}
        target, asynchronous = folder / f"{stage} {bf16}", bool(number % 2)
        saver = Saver(engine, target, CheckpointConfig(asynchronous=asynchronous), lambda step, seconds: None)
        saver.save(2, {}, {})
        train(engine, 3)  # while an asynchronous save is still being written
        saver.finish()
        if rank == 0:
            torch.save(seen, target / "seen.pt")
        dist.barrier()


def train_and_check(engine, bf16: bool) -> dict[str, np.ndarray]:
    """Train two steps; returns what is seen then. The averages are those of DeepSpeed's fp32 weights, the teacher
    computes with them, and what is frozen stays."""
    torch.manual_seed(0)
    drawn = Complete().state_dict()
    expected = {name: values.flatten() for name, values in drawn.items() if name.startswith("teacher.")}
    for step in range(3):
        if step:
            train(engine, step)
        seen, found = seen_by_deepspeed(engine) if step else computed_weights(engine), averages(engine)
        for name, average in expected.items():
            if step:
                student = torch.from_numpy(seen["weight middle" + name.removeprefix("teacher")].ravel())
                average.lerp_(student, 1 - engine.module.momentum_at(step / 4))
            np.testing.assert_array_equal(found[name], average.numpy(), name)
        for name, values in {**expected, **{n: v for n, v in drawn.items() if n.startswith("fixed.")}}.items():
            computed = values.bfloat16().float() if bf16 else values
            np.testing.assert_array_equal(seen[f"computes {name}"].ravel(), computed.numpy().ravel(), name)
    return seen


def read(rank: int, world: int, folder: Path) -> None:
    """Each stage reads what one of the others wrote: which one, depends on the number of ranks."""
    for stage, bf16 in VARIANTS:
        stages = STAGES[bf16]
        written_stage = stages[(stages.index(stage) + world) % len(stages)]
        source = folder / f"{written_stage} {bf16}"
        seen = torch.load(source / "seen.pt", weights_only=False)
        found = checkpoint.verify(source / "checkpoint-2")
        engine = build(stage, bf16, SavedState(found.folder))
        load_engine(engine, found)
        restored = seen_by_deepspeed(engine) | {f"average {name}": values for name, values in averages(engine).items()}
        restored |= {f"extra {name}": value.numpy() for name, value in copy_extra_state(engine.module).items()}
        assert restored.keys() == seen.keys()
        for name, values in restored.items():
            np.testing.assert_array_equal(values, seen[name], f"{name}: {written_stage} → {stage}, bf16 {bf16}")
        assert sharded_state.adam_steps(engine) == 2 and engine.global_steps == 2
        train(engine, 3)
        assert sharded_state.adam_steps(engine) == 3


@pytest.mark.slow
def test_stages_and_ranks_read_what_others_wrote(tmp_path):
    """fp32 weights, moments, averages, extra state and the weights computed with, to the bit; 2 ranks write, 3 and 1
    read."""
    run_ranks(write, 2, tmp_path)
    for world in (3, 1):
        run_ranks(read, world, tmp_path)


@pytest.fixture
def saved(tmp_path):
    """A parameter of 10 weights in pieces of 4 and 6, written by two ranks; and the weights."""
    values = torch.arange(10) / 7
    for rank, (a, b) in enumerate([(0, 4), (4, 10)]):
        write_pieces(tmp_path / f"weight-{rank}.safetensors", {ParamSlice("a.b", a): values[a:b]})
    return SavedState(tmp_path), values


def test_any_range_is_put_together_from_the_pieces(saved):
    reader, values = saved
    for a, b in itertools.combinations(range(11), 2):
        assert torch.equal(reader.read("weight", ParamSlice("a.b", a), b - a), values[a:b])


@pytest.mark.parametrize("piece, numel", [(ParamSlice("a.b", 8), 3), (ParamSlice("a.c", 0), 1)])
def test_what_no_piece_holds_is_refused(saved, piece, numel):
    with pytest.raises(RunError, match=f"weight of {piece.name} is incomplete"):
        saved[0].read("weight", piece, numel)


def test_the_file_is_safetensors(tmp_path):
    pieces = {
        ParamSlice("a", 3): torch.randn(5),
        ParamSlice("b.c", 0): torch.randn(2).bfloat16(),
        ParamSlice("é", 0): torch.ones(1),
    }
    checksum, _ = write_pieces(tmp_path / "mine", pieces)
    assert checksum["size"] == (tmp_path / "mine").stat().st_size
    assert checksum["sha256"] == hashlib.sha256((tmp_path / "mine").read_bytes()).hexdigest()
    with safe_open(tmp_path / "mine", "pt") as file:
        assert set(file.keys()) == {"a@3", "b.c@0", "é@0"}
        for (name, start), tensor in pieces.items():
            assert torch.equal(file.get_tensor(f"{name}@{start}"), tensor.float())


def test_the_digest_is_that_of_its_definition():
    values = np.random.default_rng(0).standard_normal(2 * BLOCK + 9).astype(np.float32)
    bits = values.view(np.uint32).tolist()
    expected = 0
    for i, value in enumerate(bits):
        key = hashlib.blake2b(f"a:{i // BLOCK}".encode(), digest_size=8).digest()
        expected += value * int(sharded_state.FACTORS[i % BLOCK]) * (int.from_bytes(key) | 1)
    assert digest_of(ParamSlice("a", 0), values) == expected % 2**64


def test_the_digest_does_not_depend_on_the_cuts_but_on_every_value_and_its_place():
    values = np.random.default_rng(0).standard_normal(2 * BLOCK + 9).astype(np.float32)
    whole = digest_of(ParamSlice("a", 0), values)
    for cut in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 8):
        parts = digest_of(ParamSlice("a", 0), values[:cut]) + digest_of(ParamSlice("a", cut), values[cut:])
        assert parts % 2**64 == whole
    others = {whole, digest_of(ParamSlice("b", 0), values), digest_of(ParamSlice("a", 1), values)}
    for place in (0, BLOCK, len(values) - 1):
        changed = values.copy()
        changed[place] = np.nextafter(changed[place], np.float32(9))
        others.add(digest_of(ParamSlice("a", 0), changed))
    swapped = values.copy()
    swapped[[5, BLOCK + 5]] = swapped[[BLOCK + 5, 5]]
    others.add(digest_of(ParamSlice("a", 0), swapped))
    assert len(others) == 7
