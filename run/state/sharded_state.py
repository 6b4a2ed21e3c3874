"""The state by parameter name: what a rank holds of it, its files, and its digest.

Every parameter has a weight: the optimizer's fp32 master, which also has moments; a teacher's fp32 average
(averages.py); or the value of a frozen parameter as the model computes with it. A rank holds slices of them, as its
ZeRO stage cuts them. In a checkpoint a slice is a piece: the elements
from `start` of a flattened parameter, fp32, tensor `NAME@START` of a safetensors file. A reader puts any range
together from the pieces that cover it, through memory maps, so the ranks and the ZeRO stage of the run that reads need
not be those of the run that wrote. There is nothing to convert, no pickle, and no rank holds more than its own share.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from mug.run.common.errors import RunError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by the names of PyTorch and DeepSpeed
KINDS = (WEIGHT, *MOMENTS)


class ParamSlice(NamedTuple):
    """The beginning of a piece: the parameter's name and the first element, of the flattened parameter."""

    name: str
    start: int


ParamSlices = dict[ParamSlice, Tensor]  # each [numel]
State = dict[str, ParamSlices]  # by kind


# --- What a rank holds ------------------------------------------------------------------------------------


class OwnedSlice(NamedTuple):
    """Elements of a parameter, and where this rank holds them."""

    piece: ParamSlice
    numel: int
    master: Tensor  # what the optimizer steps; a teacher's average; a frozen parameter, or this rank's part of it
    offset: int  # of the first element in `master`
    kinds: tuple[str, ...] = (WEIGHT,)  # moments too, where the optimizer steps it

    @property
    def weight(self) -> Tensor:
        """[numel], a view: writing to it changes what is trained."""
        return self.master.detach().view(-1).narrow(0, self.offset, self.numel)


def owned_slices(engine: Any) -> list[OwnedSlice]:
    """Returns this rank's slices: each element belongs to one rank. What all ranks hold in full, they share."""
    stage, trained, frozen = engine.zero_optimization_stage(), _trained_slices(engine), list(frozen_slices(engine))
    sharded, whole = (trained + frozen, []) if stage == 3 else (trained, frozen) if stage else ([], trained + frozen)
    rank, world = engine.global_rank, engine.world_size
    cuts = [(one, rank * one.numel // world, (rank + 1) * one.numel // world) for one in whole]
    shares = [OwnedSlice(ParamSlice(one.piece.name, a), b - a, one.master, a, one.kinds) for one, a, b in cuts if a < b]
    return sharded + shares


def _trained_slices(engine: Any) -> list[OwnedSlice]:
    """Returns all slices of this rank that change in a step: the optimizer's, and the teachers' averages."""
    return [*optimizer_slices(engine), *(one.teacher for slices in engine.averages.values() for one in slices)]


def slices_by_kind(engine: Any, held: Iterable[OwnedSlice]) -> State:
    """Returns weights and moments, as views: writing to them changes what is trained."""
    state: State = {kind: {} for kind in KINDS}
    optimizer = engine.basic_optimizer
    for one in held:
        state[WEIGHT][one.piece] = one.weight
        if one.kinds == (WEIGHT,):
            continue
        if not optimizer.state[one.master]:  # stage 0, before the first update: a run can be saved that has skipped it
            optimizer.state[one.master] = new_adam_state(optimizer, one.master, steps=0)
        for kind in MOMENTS:
            moment = optimizer.state[one.master][kind]
            state[kind][one.piece] = moment.detach().view(-1).narrow(0, one.offset, one.numel)
    return state


def adam_steps(engine: Any) -> int:
    """Returns the steps that AdamW's bias correction counts; apex counts them in its groups."""
    optimizer = engine.basic_optimizer
    return int({**next(iter(optimizer.state.values())), **optimizer.param_groups[0]}["step"])


def optimizer_slices(engine: Any) -> Iterator[OwnedSlice]:
    """Returns all that this rank's optimizer holds; DeepSpeed has no public name for it below stage 3."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    zero, stage, groups = engine.optimizer, engine.zero_optimization_stage(), engine.basic_optimizer.param_groups
    if stage == 3:  # 1 / world of each parameter; the last ranks' shares end in padding
        for parameters, master in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for parameter in parameters:
                share = parameter.partition_numel()
                start = engine.global_rank * share
                if start < parameter.ds_numel:
                    numel = min(share, parameter.ds_numel - start)
                    yield OwnedSlice(ParamSlice(names[parameter], start), numel, master, offset, KINDS)
                offset += share
    elif stage > 0:  # 1 / world of each group of parameters, laid end to end
        for parameter, name in names.items():
            if (held := getattr(parameter, "_hp_mapping", None)) is not None:  # a frozen one has none
                (master,) = groups[held.param_group_index]["params"]
                numel, start = held.lp_fragment_address.numel, held.lp_fragment_address.start
                yield OwnedSlice(ParamSlice(name, start), numel, master, held.hp_fragment_address.start, KINDS)
    else:  # all; in bf16 the optimizer steps fp32 copies
        parameters = itertools.chain(*getattr(zero, "fp16_groups", [group["params"] for group in groups]))
        masters = itertools.chain(*(group["params"] for group in groups))
        for parameter, master in zip(parameters, masters, strict=True):
            yield OwnedSlice(ParamSlice(names[parameter], 0), parameter.numel(), master, 0, KINDS)


def frozen_slices(engine: Any) -> Iterator[OwnedSlice]:
    """Returns this rank's part of the frozen parameters: under stage 3 its part of each, else all of them."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad or name in engine.averages:
            continue
        if engine.zero_optimization_stage() < 3:
            yield OwnedSlice(ParamSlice(name, 0), parameter.numel(), parameter.data, 0)
        elif (start := engine.global_rank * parameter.partition_numel()) < parameter.ds_numel:  # else padding
            numel = min(parameter.partition_numel(), parameter.ds_numel - start)
            yield OwnedSlice(ParamSlice(name, start), numel, parameter.ds_tensor, 0)


# --- Files ------------------------------------------------------------------------------------------------


def write_pieces(path: Path, pieces: ParamSlices) -> tuple[dict[str, Any], int]:
    """Write a safetensors file piece by piece, and fsync it; returns its `size` and `sha256`, and the pieces' digest.

    safetensors' own writer first builds the entire file in memory.
    """
    header, end = {}, 0
    for piece, tensor in pieces.items():
        begin, end = end, end + 4 * tensor.numel()
        header[f"{piece.name}@{piece.start}"] = {
            "dtype": "F32",
            "shape": [tensor.numel()],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    sha256, digest = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            sha256.update(part)
        for piece, tensor in pieces.items():
            values = _on_host(tensor)
            file.write(values)
            sha256.update(values)
            digest += digest_of(piece, values)
        file.flush()
        os.fsync(file.fileno())
    return {"size": 8 + len(text) + end, "sha256": sha256.hexdigest()}, digest % 2**64


def _on_host(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


class SavedState:
    """Reads ranges of parameters and moments from the files that any number of ranks have written.

    Raises:
        RunError: a range that no piece covers.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.index: dict[str, dict[str, list[tuple[int, int, Any]]]] = {}  # kind → name → (start, end, tensor on disk)

    def read(self, kind: str, piece: ParamSlice, numel: int) -> Tensor:
        """Returns fp32 [numel] on the CPU: the elements of a parameter from `piece.start` on."""
        values, filled = torch.empty(numel), 0
        first, last = piece.start, piece.start + numel
        for start, end, stored in self._pieces(kind).get(piece.name, ()):
            a, b = max(start, first), min(end, last)
            if a < b:
                values[a - first : b - first] = stored[a - start : b - start]
                filled += b - a
        if filled != numel:
            raise RunError(f"{self.folder}: {kind} of {piece.name} is incomplete ({filled} of {numel} elements)")
        return values

    def _pieces(self, kind: str) -> dict[str, list[tuple[int, int, Any]]]:
        if kind not in self.index:
            by_name = self.index[kind] = {}
            for path in sorted(self.folder.glob(f"{kind}-*.safetensors")):
                file = safe_open(path, framework="pt")
                for key in file.keys():  # noqa: SIM118
                    name, _, start = key.rpartition("@")
                    stored = file.get_slice(key)
                    by_name.setdefault(name, []).append((int(start), int(start) + stored.get_shape()[0], stored))
        return self.index[kind]


# --- Restore ----------------------------------------------------------------------------------------------


@torch.no_grad()
def load_weights(model: nn.Module, saved: SavedState, prefix: str = "") -> None:
    """Fill a complete model, not yet given to DeepSpeed, parameter by parameter.

    prefix: what stands before its parameters' names there, if it was a part of what was saved.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(saved.read(WEIGHT, ParamSlice(prefix + name, 0), parameter.numel()).view_as(parameter))


@torch.no_grad()
def fill_masters(engine: Any, weights: dict[str, Tensor]) -> None:
    """Give the fp32 weights that the optimizer steps the digits that bf16 lacks.

    The engine has made them from the weights in bf16. Left there, on bf16's own grid, none would leave its cell while
    the learning rate warms up: the model would not move for some steps, and then all at once.

    Args:
        weights: of the entire model, fp32, as they were before the engine was built.
    """
    for one in optimizer_slices(engine):
        one.weight.copy_(weights[one.piece.name].flatten()[one.piece.start : one.piece.start + one.numel])


@torch.no_grad()
def load_optimizer(engine: Any, saved: SavedState, steps: int) -> None:
    """Fill what this rank's optimizer holds, of a model that had `load_weights` before the engine was built.

    The engine has made its copies (bf16, gathered, offloaded) from those weights. Here the fp32 weights and averages
    get the digits that bf16 lacks, and AdamW its moments and the `steps` of its bias correction.
    """
    held = _trained_slices(engine)
    for master in dict.fromkeys(one.master for one in optimizer_slices(engine)):
        engine.basic_optimizer.state[master] = new_adam_state(engine.basic_optimizer, master, steps)
    if type(engine.basic_optimizer).__module__.startswith("apex."):
        for group in engine.basic_optimizer.param_groups:
            group["step"] = steps
    for kind, pieces in slices_by_kind(engine, held).items():
        for piece, values in pieces.items():
            values.copy_(saved.read(kind, piece, len(values)))


def new_adam_state(optimizer: torch.optim.Optimizer, master: Tensor, steps: int) -> dict[str, Any]:
    """Returns AdamW's initial state of a tensor: PyTorch counts steps in a tensor, DeepSpeed's own in an int."""
    step: Tensor | int = steps
    if isinstance(optimizer, torch.optim.AdamW):
        step = torch.tensor(float(steps), device=master.device if optimizer.defaults["fused"] else "cpu")
    return {"step": step, **{moment: torch.zeros_like(master) for moment in MOMENTS}}


# --- Digest -----------------------------------------------------------------------------------------------

BLOCK = 1 << 16
# Odd, so that every bit of a value counts.
FACTORS = np.random.Generator(np.random.Philox(0x4D5547)).integers(0, 2**64, BLOCK, np.uint64) | np.uint64(1)


def digest_of(piece: ParamSlice, values: np.ndarray) -> int:
    """Returns a 64-bit hash of a piece such that the sum over pieces, modulo 2^64, does not depend on the cuts.

    Multilinear hashing: each value's bits times a factor that its place decides. SHA-256 could not be put together
    from the parts that ranks hold; it guards the files, this the way from one partition to another.
    """
    bits, total, done = values.view(np.uint32), 0, 0
    while done < len(bits):
        block, place = divmod(piece.start + done, BLOCK)
        part = bits[done : done + BLOCK - place]
        key = hashlib.blake2b(f"{piece.name}:{block}".encode(), digest_size=8).digest()
        total += int(np.dot(part.astype(np.uint64), FACTORS[place : place + len(part)])) * (int.from_bytes(key) | 1)
        done += len(part)
    return total % 2**64


def engine_digests(engine: Any) -> dict[str, str]:
    """Returns the digest of each kind over all ranks: a collective call."""
    sums = [
        sum(digest_of(piece, _on_host(values)) for piece, values in pieces.items()) % 2**64
        for pieces in slices_by_kind(engine, owned_slices(engine)).values()
    ]
    total = torch.from_numpy(np.array(sums, np.uint64).view(np.int64)).to(engine.device)
    dist.all_reduce(total)  # wraps around, as the digest does
    return {kind: hexadecimal(value) for kind, value in zip(KINDS, total.tolist(), strict=True)}


def hexadecimal(digest: int) -> str:
    return f"{digest % 2**64:016x}"
