"""Labelled images by their place in the global order: what training and evaluation read batches of."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mug.data import rng
from mug.data.ledger import Replaced
from mug.data.order import Order
from mug.data.pairs import EvaluationView, TrainView
from mug.data.stream import Share, TrainStream
from mug.run.evaluation.datasets import Source, Splits
from mug.run.finetuning.augment import Augment
from mug.run.finetuning.recipe import FinetuneRecipe

Batch = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images of C classes, as a view shows them and `augment`, if any, changes them.

    labels_N: int64, 0..C-1.
    """

    source: Source
    labels_N: np.ndarray
    names: list[str]
    size: int
    decode: str
    view: TrainView | EvaluationView
    augment: Augment | None

    def __len__(self) -> int:
        return len(self.source)

    def identity(self) -> dict[str, str]:
        """What a position's sample depends on, beside the order."""
        labels = f"{json.dumps(self.names)} {hashlib.sha256(self.labels_N.tobytes()).hexdigest()}"
        return {"fingerprint": self.source.fingerprint, "labels": hashlib.sha256(labels.encode()).hexdigest()}

    def batch(self, positions: Sequence[int]) -> tuple[Batch, list[Replaced]]:
        """`image` uint8 [B, 3, S, S], `target` fp32 [B, C], `position` int64 [B]; none stands in for another.

        Raises:
            DataError: an image cannot be read or decoded; it is named.
        """
        position_B = np.asarray(positions, dtype=np.int64)
        epoch_B, _, number_B = self.view.locate(position_B)
        places = zip(*(array.tolist() for array in (position_B, epoch_B, number_B)), strict=True)
        views = [self._view(*place) for place in places]
        labels_B = self.labels_N[number_B]
        if self.augment:
            draw = self._draw(rng.MIX, int(epoch_B[0]), int(position_B[0]))
            image, target = self.augment.batch(views, labels_B.tolist(), draw)
        else:
            image = torch.from_numpy(np.stack(views))
            target = torch.nn.functional.one_hot(torch.from_numpy(labels_B), len(self.names)).float()
        return {"image": image, "target": target, "position": torch.from_numpy(position_B)}, []

    def _view(self, position: int, epoch: int, number: int) -> np.ndarray:
        view_CSS = self.source.view(number, self.size, self.view.crop(epoch, position), self.decode)
        if self.augment is None:
            return view_CSS
        return self.augment.view(view_CSS, self._draw(rng.AUGMENT, epoch, position))

    def _draw(self, purpose: int, epoch: int, position: int) -> int:
        return int(rng.raw(self.view.order.seed, purpose, epoch, position, 1)[0])


def open_images(recipe: FinetuneRecipe, splits: Splits, share: Share) -> tuple[TrainStream, LabelledImages]:
    """The training stream of one rank, and the test images.

    Raises:
        RunError: an augmentation that timm does not know.
    """
    data, size = recipe.data, recipe.model.encoder.image_size
    augment = Augment(recipe.augment, size, len(splits.names))
    order = Order(np.array([len(splits.train)]), recipe.seed)
    train_view = TrainView(order, tuple(data.crop_scale), data.flip)
    test_view = EvaluationView(np.array([len(splits.test)]), data.central_share)
    shown = (splits.names, size, data.decode)
    train = LabelledImages(splits.train, splits.train_labels, *shown, train_view, augment)
    test = LabelledImages(splits.test, splits.test_labels, *shown, test_view, None)
    return TrainStream(train, share, data.workers), test
