"""Shares an evaluation's work among ranks: each takes every R-th item, and all get all results."""

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mug.run.cluster import hardware

T = TypeVar("T")


def share(total: int) -> range:
    """Returns the items of 0..total-1 that this rank takes."""
    return range(dist.get_rank(), total, dist.get_world_size())


def gather_rows(mine_nX: Tensor, total: int) -> Tensor:
    """Returns [total, ...] on the CPU, on all ranks: the rows of all items in their order; a collective call.

    mine_nX: this rank's rows, one for each item of its `share`; further ones, as of a rank without an item, are left
        out. The same dtype and sizes on all ranks.
    """
    rows = -(-total // dist.get_world_size())
    padded_rX = mine_nX.new_zeros(rows, *mine_nX.shape[1:], device=hardware.device())
    count = min(len(mine_nX), len(share(total)))
    padded_rX[:count] = mine_nX[:count].to(padded_rX.device)
    parts = [torch.empty_like(padded_rX) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded_rX)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total].cpu()


def broadcast_rows(rows_NX: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Returns fp32 `shape` on the CPU, on all ranks: what rank 0 gives; a collective call."""
    value = torch.empty(shape) if rows_NX is None else rows_NX
    value = value.to(hardware.device()).contiguous()
    dist.broadcast(value, src=0)
    return value.cpu()


def gather_numbered(mine: Iterable[tuple[int, T]]) -> list[T]:
    """Returns what all ranks have found, in the order of its numbers; a collective call."""
    return [one for _, one in sorted(hardware.gather(list(mine)), key=lambda numbered: numbered[0])]


def sum_over_ranks(counts_K: Tensor) -> list[int]:
    """Returns the sums over all ranks of int64 [K]; a collective call."""
    counts_K = counts_K.to(hardware.device())
    dist.all_reduce(counts_K)
    return counts_K.tolist()
