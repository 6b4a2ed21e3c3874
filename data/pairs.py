"""Positions → samples: where each lies, its bytes, its crop and its caption; what cannot be used is replaced."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mug.data import rng
from mug.data.captions import choose
from mug.data.crops import CROP_DRAWS, CentralSquare, Crop, RandomCrop
from mug.data.decode import Mode, decode_crop
from mug.data.errors import BadSample, DataError
from mug.data.ledger import Replaced
from mug.data.order import Order
from mug.data.reader import Parts, Reader
from mug.data.remote import shown
from mug.data.tokenizer import Tokenizer

Batch = dict[str, Tensor]

SUBSTITUTES = 8  # rows that are tried in the place of one that cannot be used


class View(Protocol):
    """Which sample stands at a position, and what of it is shown there."""

    def locate(self, positions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, shard and row of each position, int64 [N] each."""

    def crop(self, epoch: int, position: int) -> Crop:
        """The part of the image."""

    def caption(self, epoch: int, position: int) -> float:
        """In [0, 1): which of a pair's captions."""

    def substitutes(self, epoch: int, position: int) -> np.ndarray:
        """uint64 [SUBSTITUTES]: which rows of the shard, by their remainder, to try instead of one that is bad."""


@dataclass(frozen=True)
class TrainView:
    """The random order, crops, flips and captions of training: functions of (seed, epoch, position) alone."""

    order: Order
    crop_scale: tuple[float, float]
    flip: bool

    def locate(self, positions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.order.locate(positions_N)

    def crop(self, epoch: int, position: int) -> Crop:
        flip = self.flip and rng.uniform(self.order.seed, rng.FLIP, epoch, position, 1)[0] < 0.5
        return RandomCrop(self.crop_scale, rng.uniform(self.order.seed, rng.CROP, epoch, position, CROP_DRAWS), flip)

    def caption(self, epoch: int, position: int) -> float:
        return rng.uniform(self.order.seed, rng.CAPTION, epoch, position, 1)[0]

    def substitutes(self, epoch: int, position: int) -> np.ndarray:
        return rng.raw(self.order.seed, rng.SUBSTITUTE, epoch, position, SUBSTITUTES)


@dataclass(frozen=True, eq=False)
class EvaluationView:
    """Samples in the order of the S shards, which hold counts_S (int64 [S]); central squares, first captions."""

    counts_S: np.ndarray
    fraction: float = 1.0  # of the shorter side, that the square takes

    def locate(self, positions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ends_S = np.cumsum(self.counts_S)
        shards_N = np.searchsorted(ends_S, positions_N, side="right")
        return np.zeros_like(positions_N), shards_N, positions_N - (ends_S - self.counts_S)[shards_N]

    def crop(self, epoch: int, position: int) -> Crop:
        return CentralSquare(self.fraction)

    def caption(self, epoch: int, position: int) -> float:
        return 0.0

    def substitutes(self, epoch: int, position: int) -> np.ndarray:
        return rng.raw(0, rng.SUBSTITUTE, epoch, position, SUBSTITUTES)


@dataclass(frozen=True, eq=False)
class Pairs:
    """The image-text pairs of an index, by position, as a view shows them."""

    reader: Reader
    tokenizer: Tokenizer
    image_size: int
    text_length: int
    languages: tuple[str, ...]
    decode: Mode
    view: View

    def __post_init__(self):
        if self.text_length < 3:
            raise DataError(f"text length {self.text_length} leaves no room between BOS and EOS: give 3 or more")

    def __len__(self) -> int:
        """Number of samples in the shards."""
        return len(self.reader.index)

    def identity(self) -> dict[str, str]:
        """What a position's sample depends on, beside the order."""
        return {"fingerprint": self.reader.index.fingerprint, "tokenizer": self.tokenizer.fingerprint}

    def batch(self, positions: Sequence[int]) -> tuple[Batch, list[Replaced]]:
        """B samples, and which of them stand in for others.

        The batch: `image` uint8 [B, 3, S, S]; `tokens` int64 [B, T], BOS first, EOS last, PAD after, all PAD where
        a pair has no caption; `position` int64 [B].

        Raises:
            DataError: a shard cannot be read, or so much of it cannot be used that nothing stands in.
        """
        positions_B = np.asarray(positions, dtype=np.int64)
        image_BCHW = np.empty((len(positions_B), 3, self.image_size, self.image_size), dtype=np.uint8)
        tokens_BT = np.empty((len(positions_B), self.text_length), dtype=np.int64)
        replaced: list[Replaced] = []
        epochs, shards, rows = (array.tolist() for array in self.view.locate(positions_B))
        reads = self.reader.ahead(list(zip(shards, rows, strict=True)))
        for i, read in enumerate(reads):
            image_BCHW[i], tokens_BT[i], bad = self._usable(int(positions_B[i]), epochs[i], shards[i], rows[i], read)
            replaced += bad
        arrays = {"image": image_BCHW, "tokens": tokens_BT, "position": positions_B}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, replaced

    def _usable(
        self, position: int, epoch: int, shard: int, row: int, read: Callable[[], Parts]
    ) -> tuple[np.ndarray, np.ndarray, list[Replaced]]:
        """The image and the tokens at a position, and the samples that could not be used there."""
        index, bad = self.reader.index, []
        count = int(index.counts_S[shard])
        for substitute in (None, *self.view.substitutes(epoch, position)):
            if substitute is not None:
                row = int(substitute) % count
                read = partial(self.reader.read, shard, row)
            try:
                return *self._sample(position, epoch, read()), bad
            except BadSample as error:
                bad.append(Replaced(position, shown(index.urls[shard]), index.key(shard, row), str(error), count))
        raise DataError(
            f"shard '{bad[-1].shard}': {len(bad)} samples in a row cannot be used, the last '{bad[-1].key}':"
            f" {bad[-1].reason}; write it anew or leave it out"
        )

    def _sample(self, position: int, epoch: int, parts: Parts) -> tuple[np.ndarray, np.ndarray]:
        image, text, meta = parts
        view_CSS = decode_crop(image, self.image_size, self.view.crop(epoch, position), self.decode)
        caption = choose(text, meta, self.languages, self.view.caption(epoch, position))
        return view_CSS, self.tokenizer.encode(caption, self.text_length)
