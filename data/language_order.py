"""The order of samples whose shards are named by their language, with a share for each language."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mug.data.errors import DataError
from mug.data.order import Order
from mug.data.shares import locate


@dataclass(frozen=True, eq=False)
class LanguageOrder:
    """Draws each sample from one of L languages by n^exponent, n the number of its samples, and orders each by itself.

    Shares hold to within a few samples at any time, and nothing is O(N): see `mug.data.shares` and `mug.data.order`.

    counts_S: int64 [S], the number of samples in each shard.
    languages_S: of each shard; the shards of a language are consecutive.
    """

    counts_S: np.ndarray
    languages_S: Sequence[str]
    exponent: float
    seed: int

    @cached_property
    def _orders(self) -> dict[str, Order]:
        """Returns language → the order of its shards."""
        languages_S = np.array(self.languages_S)
        return {one: Order(self.counts_S[languages_S == one], self.seed) for one in dict.fromkeys(self.languages_S)}

    @cached_property
    def weights(self) -> dict[str, float]:
        """Returns language → its share of the samples, relative to the others'."""
        return {language: float(order.total) ** self.exponent for language, order in self._orders.items()}

    def __len__(self) -> int:
        """Returns the number of positions in an epoch: the sum of the languages'."""
        return sum(len(order) for order in self._orders.values())

    def constants(self) -> dict[str, Any]:
        """Returns what, with the seed and the shards' counts, fixes the order."""
        return {"exponent": self.exponent, "languages": self.weights}

    def locate(self, positions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns epoch, shard and row within the shard, int64 [N] each, of the positions (≥ 0) int64 [N].

        An epoch is that of the sample's language.
        """
        positions_N = np.asarray(positions_N, dtype=np.int64)
        weights = tuple(self.weights.values())
        drawn_N2 = np.array([locate(weights, self.seed, p) for p in positions_N.tolist()], np.int64).reshape(-1, 2)
        found_3N = np.empty((3, len(positions_N)), np.int64)
        for number, (language, order) in enumerate(self._orders.items()):
            here = drawn_N2[:, 0] == number
            epochs, shards, rows = order.locate(drawn_N2[here, 1])
            found_3N[:, here] = epochs, shards + self.languages_S.index(language), rows
        return found_3N[0], found_3N[1], found_3N[2]


def order_of(counts_S: np.ndarray, languages_S: Sequence[str], exponent: float, seed: int) -> Order | LanguageOrder:
    """Returns the order of the shards; by their languages, where these are known.

    Raises:
        DataError: the shards of a language hold no samples.
    """
    if not languages_S:
        return Order(counts_S, seed)
    for language in dict.fromkeys(languages_S):
        if not counts_S[np.array(languages_S) == language].sum():
            raise DataError(f"the shards of language '{language}' hold no samples: leave it out of data.language")
    return LanguageOrder(counts_S, languages_S, exponent, seed)
