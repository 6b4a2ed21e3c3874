"""The trained state by parameter name: what a rank holds of it, its files, and its digest.

A rank holds slices of the parameters, as its ZeRO stage cuts them. In a checkpoint a slice is a piece: the elements
from `start` of a flattened parameter, fp32, tensor `NAME@START` of a safetensors file. A reader puts any range
together from the pieces that cover it, through memory maps, so the ranks and the ZeRO stage of the run that reads need
not be those of the run that wrote. There is nothing to convert, no pickle, and nobody holds more than its own share.
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

from mug.run.training.errors import RunError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, under the names that PyTorch and DeepSpeed have for them
KINDS = (WEIGHT, *MOMENTS)


class Piece(NamedTuple):
    """Where a piece begins: the parameter's name and the first element, of the flattened parameter."""

    name: str
    start: int


Pieces = dict[Piece, Tensor]  # each [numel]
State = dict[str, Pieces]  # by kind


# --- What a rank holds ------------------------------------------------------------------------------------


class Held(NamedTuple):
    """Elements of a parameter that this rank's optimizer steps, and where they stand in a tensor of its."""

    piece: Piece
    numel: int
    master: Tensor
    offset: int  # of the first element in `master`


def owned(engine: Any) -> list[Held]:
    """What this rank answers for: each element belongs to one rank. Under stage 0 all ranks hold all, and share."""
    held = list(_held(engine))
    if engine.zero_optimization_stage() > 0:
        return held
    rank, world = engine.global_rank, engine.world_size
    cuts = [(one, rank * one.numel // world, (rank + 1) * one.numel // world) for one in held]
    return [Held(Piece(one.piece.name, a), b - a, one.master, a) for one, a, b in cuts if a < b]


def state_of(engine: Any, held: Iterable[Held]) -> State:
    """fp32 weights and moments, as views: writing to them changes what is trained."""
    state: State = {kind: {} for kind in KINDS}
    optimizer = engine.basic_optimizer
    for piece, numel, master, offset in held:
        if not optimizer.state[master]:  # stage 0, before the first update: a run can be saved that has skipped it
            optimizer.state[master] = _blank_state(optimizer, master, steps=0)
        tensors = {WEIGHT: master, **optimizer.state[master]}
        for kind in KINDS:
            state[kind][piece] = tensors[kind].detach().view(-1).narrow(0, offset, numel)
    return state


def adam_steps(engine: Any) -> int:
    """How many steps AdamW's bias correction counts; apex counts them in its groups."""
    optimizer = engine.basic_optimizer
    return int({**next(iter(optimizer.state.values())), **optimizer.param_groups[0]}["step"])


def _held(engine: Any) -> Iterator[Held]:
    """All that this rank's optimizer holds; DeepSpeed has no public name for it below stage 3."""
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
                    yield Held(Piece(names[parameter], start), numel, master, offset)
                offset += share
    elif stage > 0:  # 1 / world of each group of parameters, laid end to end
        for parameter, name in names.items():
            if (held := parameter._hp_mapping) is not None:
                (master,) = groups[held.param_group_index]["params"]
                numel, start = held.lp_fragment_address.numel, held.lp_fragment_address.start
                yield Held(Piece(name, start), numel, master, held.hp_fragment_address.start)
    else:  # all; in bf16 the optimizer steps fp32 copies
        parameters = itertools.chain(*getattr(zero, "fp16_groups", [group["params"] for group in groups]))
        masters = itertools.chain(*(group["params"] for group in groups))
        for parameter, master in zip(parameters, masters, strict=True):
            yield Held(Piece(names[parameter], 0), parameter.numel(), master, 0)


# --- Files ------------------------------------------------------------------------------------------------


def write_pieces(path: Path, pieces: Pieces) -> tuple[dict[str, Any], int]:
    """Write a safetensors file piece by piece, and fsync it; its `size` and `sha256`, and the pieces' digest.

    safetensors' own writer first puts the whole file together in memory.
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

    def read(self, kind: str, piece: Piece, numel: int) -> Tensor:
        """fp32 [numel] on the CPU: the elements of a parameter from `piece.start` on."""
        values, filled = torch.empty(numel), 0
        first, last = piece.start, piece.start + numel
        for start, end, stored in self._pieces(kind).get(piece.name, ()):
            a, b = max(start, first), min(end, last)
            if a < b:
                values[a - first : b - first] = stored[a - start : b - start]
                filled += b - a
        if filled != numel:
            raise RunError(f"{self.folder}: {kind} of {piece.name} is not all there ({filled} of {numel} elements)")
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
    """Fill a whole model, not yet given to DeepSpeed, parameter by parameter.

    prefix: what stands before its parameters' names there, if it was a part of what was saved.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(saved.read(WEIGHT, Piece(prefix + name, 0), parameter.numel()).view_as(parameter))


@torch.no_grad()
def load_optimizer(engine: Any, saved: SavedState, steps: int) -> None:
    """Fill what this rank's optimizer holds, of a model that had `load_weights` before the engine was built.

    The engine has made its copies (bf16, gathered, offloaded) from those weights. Here the fp32 weights get the
    digits that bf16 lacks, and AdamW its moments and the `steps` of its bias correction.
    """
    held = list(_held(engine))
    for master in dict.fromkeys(one.master for one in held):
        engine.basic_optimizer.state[master] = _blank_state(engine.basic_optimizer, master, steps)
    if type(engine.basic_optimizer).__module__.startswith("apex."):
        for group in engine.basic_optimizer.param_groups:
            group["step"] = steps
    for kind, pieces in state_of(engine, held).items():
        for piece, values in pieces.items():
            values.copy_(saved.read(kind, piece, len(values)))


def _blank_state(optimizer: torch.optim.Optimizer, master: Tensor, steps: int) -> dict[str, Any]:
    """AdamW's state of a tensor, as its first step makes it: PyTorch counts in a tensor, DeepSpeed's own in an int."""
    step: Tensor | int = steps
    if isinstance(optimizer, torch.optim.AdamW):
        step = torch.tensor(float(steps), device=master.device if optimizer.defaults["fused"] else "cpu")
    return {"step": step, **{moment: torch.zeros_like(master) for moment in MOMENTS}}


# --- Digest -----------------------------------------------------------------------------------------------

BLOCK = 1 << 16
# Odd, so that every bit of a value counts.
FACTORS = np.random.Generator(np.random.Philox(0x4D5547)).integers(0, 2**64, BLOCK, np.uint64) | np.uint64(1)


def digest_of(piece: Piece, values: np.ndarray) -> int:
    """A 64-bit hash of a piece such that the sum over pieces, modulo 2^64, does not depend on the cuts.

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
    """The digest of each kind over all ranks: a collective call."""
    sums = [
        sum(digest_of(piece, _on_host(values)) for piece, values in pieces.items()) % 2**64
        for pieces in state_of(engine, owned(engine)).values()
    ]
    total = torch.from_numpy(np.array(sums, np.uint64).view(np.int64)).to(engine.device)
    dist.all_reduce(total)  # wraps around, as the digest does
    return {kind: hexadecimal(value) for kind, value in zip(KINDS, total.tolist(), strict=True)}


def hexadecimal(digest: int) -> str:
    return f"{digest % 2**64:016x}"
