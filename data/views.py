"""Which sample stands at a position, and how it is viewed there: in training, and in evaluation."""

import zlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mug.data import rng
from mug.data.crops import CentralSquare, Crop, ViewConfig, random_crop
from mug.data.language_order import LanguageOrder
from mug.data.order import Order

SUBSTITUTES = 8  # rows that are tried in the place of one that cannot be used


class View(Protocol):
    """Which sample stands at a position, and how it is viewed there.

    order: None where positions number the samples themselves. seed: of the crops of several views.
    """

    @property
    def order(self) -> Order | LanguageOrder | None: ...

    @property
    def seed(self) -> int: ...

    def locate(self, positions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns epoch, shard and row of each position, int64 [N] each."""

    def crop(self, epoch: int, position: int) -> Crop:
        """Returns the part of the image."""

    def caption(self, epoch: int, position: int) -> float:
        """Returns a number in [0, 1): which of a pair's captions."""

    def turn(self, epoch: int, key: str) -> int:
        """Returns a number that goes up by one an epoch: which of a sample's languages, by its remainder."""

    def substitutes(self, epoch: int, position: int) -> np.ndarray:
        """Returns uint64 [SUBSTITUTES]: which rows of the shard, by their remainder, to try instead of a bad one."""


@dataclass(frozen=True)
class TrainView:
    """The random order, crops, flips and captions of training: functions of (seed, epoch, position) only."""

    order: Order | LanguageOrder
    crop_scale: tuple[float, float]
    flip: bool

    @property
    def seed(self) -> int:
        return self.order.seed

    def locate(self, positions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.order.locate(positions_N)

    def crop(self, epoch: int, position: int) -> Crop:
        return random_crop(ViewConfig(self.crop_scale, self.flip), self.seed, epoch, position)

    def caption(self, epoch: int, position: int) -> float:
        return rng.uniform(self.seed, rng.CAPTION, epoch, position, 1)[0]

    def turn(self, epoch: int, key: str) -> int:
        return zlib.crc32(key.encode()) + epoch

    def substitutes(self, epoch: int, position: int) -> np.ndarray:
        return rng.raw(self.seed, rng.SUBSTITUTE, epoch, position, SUBSTITUTES)


@dataclass(frozen=True, eq=False)
class EvaluationView:
    """Samples in the order of the S shards, which hold counts_S (int64 [S]); central squares, first captions."""

    counts_S: np.ndarray
    fraction: float = 1.0  # of the shorter side, that the square takes

    @property
    def order(self) -> None:
        return None

    @property
    def seed(self) -> int:
        return 0

    def locate(self, positions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ends_S = np.cumsum(self.counts_S)
        shards_N = np.searchsorted(ends_S, positions_N, side="right")
        return np.zeros_like(positions_N), shards_N, positions_N - (ends_S - self.counts_S)[shards_N]

    def crop(self, epoch: int, position: int) -> Crop:
        return CentralSquare(self.fraction)

    def caption(self, epoch: int, position: int) -> float:
        return 0.0

    def turn(self, epoch: int, key: str) -> int:
        return 0

    def substitutes(self, epoch: int, position: int) -> np.ndarray:
        return rng.raw(self.seed, rng.SUBSTITUTE, epoch, position, SUBSTITUTES)
