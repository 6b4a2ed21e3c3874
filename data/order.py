"""The global order of samples: position → (epoch, row of the index).

A position counts samples from the start of training and runs on over epochs. Global batch b is the positions
[b·B, (b+1)·B); it may cross an epoch's end. Here an epoch is one permutation of all rows, held in memory.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mug.data import rng
from mug.data.errors import DataError


@lru_cache(maxsize=2)  # two, because a batch may cross an epoch's end
def _permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    """int64 [samples]: the rows in the order of this epoch."""
    return np.argsort(rng.raw(seed, rng.ORDER, epoch, 0, samples), kind="stable")


@dataclass(frozen=True)
class Order:
    """The order of `samples` rows under `seed`."""

    samples: int
    seed: int

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise DataError(f"seed {self.seed}: give a number from 0 to 2^63 - 1")

    def locate(self, position: int) -> tuple[int, int]:
        """The epoch that `position` (≥ 0) falls in and the row that stands there."""
        epoch, place = divmod(position, self.samples)
        return epoch, int(_permutation(self.seed, epoch, self.samples)[place])
