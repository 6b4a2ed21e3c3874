"""The global order of samples: position → (epoch, shard, row), as a pure function of the seed.

A position counts samples from the start of training and runs on over epochs. Global batch b is the positions
[b·B, (b+1)·B); it may cross an epoch's end. Nothing here is O(N): the shards of an epoch are permuted and laid end
to end, and the line of samples is cut into L equal lanes. Position g of an epoch is place g div L of lane g mod L, so
a batch takes from all over the line, while a rank of R that takes each R-th position stays in its L / R lanes.
Inside a lane, windows of about four shards are fully shuffled.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np

from mug.data import rng
from mug.data.errors import DataError

MAX_LANES = 2048
SHARDS_PER_WINDOW = 4
SAMPLES_PER_LANE = 128  # at least, so that what an epoch drops (fewer than L samples) stays below 1%
ROUNDS = 6


class SampleOrder(Protocol):
    """The order that a stream reads in: `Order`, or that of a mixture."""

    @property
    def seed(self) -> int: ...

    def __len__(self) -> int:
        """Returns the number of positions in an epoch."""

    def constants(self) -> dict[str, Any]:
        """Returns what, with the seed, fixes the order, as a checkpoint keeps it."""


@dataclass(frozen=True, eq=False)
class Order:
    """The order of the samples of S shards under `seed`.

    counts_S: int64 [S], the number of samples in each shard.
    """

    counts_S: np.ndarray
    seed: int

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise DataError(f"seed {self.seed}: give a number from 0 to 2^63 - 1")
        if self.total < 1:
            raise DataError("the shards hold no samples")

    @cached_property
    def total(self) -> int:
        """Returns the number of samples in the shards."""
        return int(self.counts_S.sum())

    @cached_property
    def lanes(self) -> int:
        """L, a power of two: many where there are many shards to mix, one where there are few."""
        bound = min(MAX_LANES, len(self.counts_S) // SHARDS_PER_WINDOW, self.total // SAMPLES_PER_LANE)
        return 1 << max(0, bound.bit_length() - 1)

    @cached_property
    def window(self) -> int:
        """Samples of a lane that are shuffled together; a lane holds an integer number of windows, but for rounding."""
        length = self.total // self.lanes
        windows = round(length * len(self.counts_S) / (SHARDS_PER_WINDOW * self.total))
        return -(-length // max(1, windows))

    def __len__(self) -> int:
        """Returns the number of positions in an epoch: all samples but fewer than L, others each time."""
        return self.total // self.lanes * self.lanes

    def constants(self) -> dict[str, int]:
        """What, with the seed and the shards' counts, fixes the order."""
        return {"lanes": self.lanes, "window": self.window}

    def locate(self, positions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns epoch, shard and row within the shard, int64 [N] each, of the positions (≥ 0) int64 [N]."""
        positions_N = np.asarray(positions_N, dtype=np.int64)
        epochs_N, places_N = np.divmod(positions_N, len(self))
        shards_N, rows_N = np.empty_like(positions_N), np.empty_like(positions_N)
        for epoch in np.unique(epochs_N).tolist():
            here = epochs_N == epoch
            line = self._line(epoch, places_N[here])
            order_S, starts_S = _permuted_shards(self, epoch)
            slot = np.searchsorted(starts_S, line, side="right") - 1
            shards_N[here], rows_N[here] = order_S[slot], line - starts_S[slot]
        return epochs_N, shards_N, rows_N

    def _line(self, epoch: int, places_N: np.ndarray) -> np.ndarray:
        """Maps places in the epoch to places on the line of samples. A bijection onto [0, len(self))."""
        length = self.total // self.lanes
        place_N, lane_N = np.divmod(places_N, self.lanes)
        # Each lane is a ring that is entered elsewhere, so that not all lanes come to new shards at once.
        place_N = (place_N + lane_N * self.window // self.lanes) % length
        window_N = place_N // self.window
        begin_N = window_N * self.window
        sizes_N = np.minimum(begin_N + self.window, length) - begin_N
        keys_N = _mix(_mix(_mix(np.uint64(self.seed), np.uint64(epoch)), lane_N), window_N)
        return lane_N * length + begin_N + permute(place_N - begin_N, sizes_N, keys_N)


@lru_cache(maxsize=2)  # two, because a batch may cross an epoch's end
def _permuted_shards(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shards in the order of this epoch, and where on the line each of them begins. int64 [S], twice."""
    draws_S = rng.raw(order.seed, rng.ORDER, epoch, 0, len(order.counts_S))
    order_S = np.argsort(draws_S, kind="stable")
    counts_S = order.counts_S[order_S]
    return order_S, np.cumsum(counts_S) - counts_S


def _mix(state: Any, value: Any) -> Any:
    """SplitMix64 of uint64 `state` and non-negative `value`, elementwise; wraps around."""
    with np.errstate(over="ignore"):
        x = (state + np.uint64(0x9E3779B97F4A7C15)) ^ (
            np.asarray(value).astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permute(places_N: np.ndarray, sizes_N: np.ndarray, keys_N: np.ndarray) -> np.ndarray:
    """Returns where a keyed permutation of [0, size) sends each place, int64 [N]; each has its own size and key.

    A Feistel network over the grid of a × b cells, b = ⌈√size⌉ and a = ⌈size / b⌉: row and column are in turn moved by
    a keyed function of the other. A place that lands outside [0, size), which few do, walks on until it is inside.
    """
    columns_N = np.ceil(np.sqrt(sizes_N)).astype(np.int64)
    rows_N = -(-sizes_N // columns_N)
    result_N = places_N.copy()
    walking = np.arange(len(places_N))
    while len(walking):
        row, column = np.divmod(result_N[walking], columns_N[walking])
        for turn in range(ROUNDS):
            row = _turn(row, column, rows_N[walking], keys_N[walking], 2 * turn)
            column = _turn(column, row, columns_N[walking], keys_N[walking], 2 * turn + 1)
        result_N[walking] = row * columns_N[walking] + column
        walking = walking[result_N[walking] >= sizes_N[walking]]
    return result_N


def _turn(moved: np.ndarray, by: np.ndarray, modulus: np.ndarray, keys: np.ndarray, turn: int) -> np.ndarray:
    draw = _mix(keys + np.uint64(turn), by) >> np.uint64(32)
    return (moved + draw.astype(np.int64)) % modulus


def spread(total: int, wanted: int) -> list[int]:
    """Returns at most `wanted` of the positions 0..total-1, ascending and spread evenly; all where they are fewer."""
    count = min(total, wanted)
    return [i * total // count for i in range(count)]
