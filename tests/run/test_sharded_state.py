"""State that one number of ranks and ZeRO stage wrote, read by others: DeepSpeed's own view of it is the oracle."""

import hashlib
import itertools
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from torch import nn

from mug.run.training import sharded_state
from mug.run.training.checkpoint import Checkpoint
from mug.run.training.errors import RunError
from mug.run.training.restore import load_engine
from mug.run.training.sharded_state import BLOCK, Piece, SavedState, digest_of, write_pieces

STAGES = {
    False: ["0", "1", "2", "3", "3, offloaded"],
    True: ["0", "1", "1, fp32 gradients", "2", "3", "3, offloaded"],  # in bf16
}
VARIANTS = [(stage, bf16) for bf16, stages in STAGES.items() for stage in stages]


class Odd(nn.Module):
    """Sizes that no number of ranks divides, a single weight, and one matrix under two names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.middle = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 7))
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.middle(self.embed(tokens)) * self.scale).float().logsumexp(-1).mean()


def build(stage: str, bf16: bool, saved: SavedState | None = None):
    import deepspeed

    torch.manual_seed(0 if saved is None else 1)
    model = Odd()
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
    decays = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decays[0], "weight_decay": 0.1}, {"params": decays[1], "weight_decay": 0.0}]
    return deepspeed.initialize(model=model, model_parameters=groups, config=config, dist_init_required=False)[0]


def train(engine, steps: int) -> None:
    for step in range(steps):
        engine.backward(engine(torch.tensor([(3 * step + engine.global_rank) % 11, 5])))
        engine.step()


def seen_by_deepspeed(engine) -> dict[str, np.ndarray]:
    """Whole fp32 weights and moments of every parameter, and the weights that the model computes with."""
    import deepspeed
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
        if engine.zero_optimization_stage() == 0:
            master = next(masters)
            seen[f"weight {name}"] = master
            for moment in ("exp_avg", "exp_avg_sq"):
                seen[f"{moment} {name}"] = engine.basic_optimizer.state[master][moment]
        else:
            seen[f"weight {name}"] = safe_get_full_fp32_param(parameter)
            for moment in ("exp_avg", "exp_avg_sq"):
                seen[f"{moment} {name}"] = safe_get_full_optimizer_state(parameter, moment)
        with deepspeed.zero.GatheredParameters([parameter]):
            seen[f"computes {name}"] = parameter.detach().float().clone()
    return {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in seen.items()}


def write(rank: int, world: int, port: int, folder: Path) -> None:
    start(rank, world, port)
    for stage, bf16 in VARIANTS:
        engine = build(stage, bf16)
        train(engine, 2)
        state = sharded_state.state_of(engine, sharded_state.owned(engine))
        target = folder / f"{stage} {bf16}"
        target.mkdir(exist_ok=True)
        for kind, pieces in state.items():
            write_pieces(target / f"{kind}-{rank}.safetensors", pieces)
        seen, digests = seen_by_deepspeed(engine), sharded_state.engine_digests(engine)
        if rank == 0:
            torch.save((seen, digests, sharded_state.adam_steps(engine)), target / "seen.pt")
        dist.barrier()
    dist.destroy_process_group()


def read(rank: int, world: int, port: int, folder: Path) -> None:
    """Each stage reads what one of the others wrote: which one, depends on the number of ranks."""
    start(rank, world, port)
    for stage, bf16 in VARIANTS:
        stages = STAGES[bf16]
        written_stage = stages[(stages.index(stage) + world) % len(stages)]
        source = folder / f"{written_stage} {bf16}"
        seen, digests, adam_steps = torch.load(source / "seen.pt", weights_only=False)
        engine = build(stage, bf16, SavedState(source))
        load_engine(engine, Checkpoint(source, {"adam_steps": adam_steps, "digests": digests, "step": 2}))
        for name, values in seen_by_deepspeed(engine).items():
            np.testing.assert_array_equal(values, seen[name], f"{name}: {written_stage} → {stage}, bf16 {bf16}")
        assert sharded_state.adam_steps(engine) == adam_steps and engine.global_steps == 2
        train(engine, 1)
        assert sharded_state.adam_steps(engine) == adam_steps + 1
    dist.destroy_process_group()


def start(rank: int, world: int, port: int) -> None:
    import os

    from mug.run.training import hardware

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    hardware.init_distributed()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_stages_and_ranks_read_what_others_wrote(tmp_path):
    """fp32 weights, moments and the weights computed with, to the bit; 2 ranks write, 3 and 1 read."""
    mp.spawn(write, (2, free_port(), tmp_path), nprocs=2)
    for world in (3, 1):
        mp.spawn(read, (world, free_port(), tmp_path), nprocs=world)


@pytest.fixture
def saved(tmp_path):
    """A parameter of 10 weights in pieces of 4 and 6, written by two ranks; and the weights."""
    values = torch.arange(10) / 7
    for rank, (a, b) in enumerate([(0, 4), (4, 10)]):
        write_pieces(tmp_path / f"weight-{rank}.safetensors", {Piece("a.b", a): values[a:b]})
    return SavedState(tmp_path), values


def test_any_range_is_put_together_from_the_pieces(saved):
    reader, values = saved
    for a, b in itertools.combinations(range(11), 2):
        assert torch.equal(reader.read("weight", Piece("a.b", a), b - a), values[a:b])


@pytest.mark.parametrize("piece, numel", [(Piece("a.b", 8), 3), (Piece("a.c", 0), 1)])
def test_what_no_piece_holds_is_refused(saved, piece, numel):
    with pytest.raises(RunError, match=f"weight of {piece.name} is not all there"):
        saved[0].read("weight", piece, numel)


def test_the_file_is_safetensors(tmp_path):
    pieces = {Piece("a", 3): torch.randn(5), Piece("b.c", 0): torch.randn(2).bfloat16(), Piece("é", 0): torch.ones(1)}
    seal, _ = write_pieces(tmp_path / "mine", pieces)
    assert seal["size"] == (tmp_path / "mine").stat().st_size
    assert seal["sha256"] == hashlib.sha256((tmp_path / "mine").read_bytes()).hexdigest()
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
    assert digest_of(Piece("a", 0), values) == expected % 2**64


def test_the_digest_does_not_depend_on_the_cuts_but_on_every_value_and_its_place():
    values = np.random.default_rng(0).standard_normal(2 * BLOCK + 9).astype(np.float32)
    whole = digest_of(Piece("a", 0), values)
    for cut in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 8):
        parts = digest_of(Piece("a", 0), values[:cut]) + digest_of(Piece("a", cut), values[cut:])
        assert parts % 2**64 == whole
    others = {whole, digest_of(Piece("b", 0), values), digest_of(Piece("a", 1), values)}
    for place in (0, BLOCK, len(values) - 1):
        changed = values.copy()
        changed[place] = np.nextafter(changed[place], np.float32(9))
        others.add(digest_of(Piece("a", 0), changed))
    swapped = values.copy()
    swapped[[5, BLOCK + 5]] = swapped[[BLOCK + 5, 5]]
    others.add(digest_of(Piece("a", 0), swapped))
    assert len(others) == 7
