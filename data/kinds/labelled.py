"""Labelled images by their place in the global order: what training and evaluation read batches of."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch

from mug.data import rng
from mug.data.augment import Augment, AugmentConfig
from mug.data.bad_samples import Replacement
from mug.data.decode import Mode
from mug.data.errors import DataError
from mug.data.kinds.samples import Batch, Shape
from mug.data.labelled_sources import Source, Splits, open_splits
from mug.data.language_order import LanguageOrder
from mug.data.order import Order
from mug.data.views import EvaluationView, TrainView


@dataclass(frozen=True)
class LabelledConfig:
    """Where the labelled images come from and how they are read.

    Args:
        images: FOLDER (with train/ and val/ or test/), 'SHARDS', fashion-mnist[:FOLDER] or openmoji: see
            data/labelled_sources.py.
        test: Images to evaluate on, where `images` does not hold them.
        label: Key of the shards' json, or column of the dataset, that holds the class.
        cache: Folder for what is built once. Without it, $MUG_CACHE, else ~/.cache/mug.
        crop_scale: Min and max share of the image's area that a random training crop covers.
        flip: Mirror half of the training images.
        crop_pct: Side of the central square that is evaluated, as a share of the image's shorter side.
        decode: 'exact' decodes at full size; 'fast' decodes a JPEG at 1/2, 1/4 or 1/8 where the crop allows.
        workers: Processes per rank that read, decode and augment; 0 works in the training process itself.
        augment: Other augmentations of training images and their targets.
    """

    images: str | None = None
    test: str | None = None
    label: str = "label"
    cache: str | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    crop_pct: float = 0.875
    decode: Literal["exact", "fast"] = "exact"
    workers: int = 2
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self):
        if isinstance(self.augment, dict):  # of a manifest
            object.__setattr__(self, "augment", AugmentConfig(**self.augment))
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise DataError(f"data.crop_scale is {self.crop_scale}; give 0 < min <= max <= 1")
        if not 0 < self.crop_pct <= 1:
            raise DataError(f"data.crop_pct must be more than 0 and at most 1, not {self.crop_pct}")
        if self.workers < 0:
            raise DataError(f"data.workers must be at least 0, not {self.workers}")


Config = LabelledConfig


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images of C classes, as a view shows them and `augment`, if any, changes them: mug.data.kinds.samples.Samples.

    labels_N: int64, 0..C-1.
    """

    source: Source
    labels_N: np.ndarray
    names: list[str]
    size: int
    decode: Mode
    view: TrainView | EvaluationView
    augment: Augment | None

    kind: ClassVar[str] = "labelled"
    tokenizer: ClassVar[None] = None

    @property
    def order(self) -> Order | LanguageOrder | None:
        """Returns the order of training, None where positions number the images themselves."""
        return self.view.order

    @property
    def class_names(self) -> tuple[str, ...]:
        """Returns the names of the classes, by their number."""
        return tuple(self.names)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.source)

    def identity(self) -> dict[str, str]:
        """Returns what a position's sample depends on, besides the order."""
        labels = f"{json.dumps(self.names)} {hashlib.sha256(self.labels_N.tobytes()).hexdigest()}"
        return {"fingerprint": self.source.fingerprint, "labels": hashlib.sha256(labels.encode()).hexdigest()}

    def files(self) -> dict[str, str]:
        """Returns what a checkpoint keeps, by file name: nothing."""
        return {}

    def batch(self, positions: Sequence[int]) -> tuple[Batch, list[Replacement]]:
        """Returns `image` uint8 [B, 3, S, S], `target` fp32 [B, C], `position` int64 [B]; none stands in for another.

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
        return Batch(self.kind, {"image": image, "target": target, "position": torch.from_numpy(position_B)}), []

    def _view(self, position: int, epoch: int, number: int) -> np.ndarray:
        view_CSS = self.source.view(number, self.size, self.view.crop(epoch, position), self.decode)
        if self.augment is None:
            return view_CSS
        return self.augment.view(view_CSS, self._draw(rng.AUGMENT, epoch, position))

    def _draw(self, purpose: int, epoch: int, position: int) -> int:
        return int(rng.raw(self.view.seed, purpose, epoch, position, 1)[0])


@dataclass(frozen=True)
class CentralSquares:
    """The central squares of all images of a source, by number, without labels: the input of a frozen encoder."""

    source: Source
    size: int

    kind: ClassVar[str] = "labelled"
    order: ClassVar[None] = None
    tokenizer: ClassVar[None] = None
    class_names: ClassVar[tuple[str, ...]] = ()

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.source)

    def identity(self) -> dict[str, str]:
        """Returns what an image depends on."""
        return {"fingerprint": self.source.fingerprint}

    def files(self) -> dict[str, str]:
        """Returns what a checkpoint keeps, by file name: nothing."""
        return {}

    def batch(self, positions: Sequence[int]) -> tuple[Batch, list[Replacement]]:
        """Returns `image` uint8 [B, 3, S, S] and `position` int64 [B]; none stands in for another.

        Raises:
            DataError: an image cannot be read or decoded; it is named.
        """
        views = [self.source.view(number, self.size) for number in positions]
        image_B3SS, position_B = torch.from_numpy(np.stack(views)), torch.tensor(list(positions))
        return Batch(self.kind, {"image": image_B3SS, "position": position_B}), []


def splits_of(config: LabelledConfig) -> Splits:
    """Returns the images that a recipe names.

    Raises:
        DataError: none are named, or see `open_splits`.
    """
    if config.images is None:
        raise DataError("data.images is missing; give the labelled images, for example --data.images imagenet")
    return open_splits(config.images, config.test, config.label, config.cache)


def open_train(config: LabelledConfig, seed: int, shape: Shape) -> LabelledImages:
    """Returns the training images.

    Raises:
        DataError: see `splits_of`; or an augmentation that timm does not know.
    """
    shape.check_one_view("labelled images")
    splits = splits_of(config)
    view = TrainView(Order(np.array([len(splits.train)]), seed), tuple(config.crop_scale), config.flip)
    augment = Augment(config.augment, shape.image_size, len(splits.names))
    common = splits.names, shape.image_size, config.decode
    return LabelledImages(splits.train, splits.train_labels, *common, view, augment)


def open_held_out(config: LabelledConfig, shape: Shape) -> LabelledImages:
    """Returns the images to evaluate on.

    Raises:
        DataError: see `splits_of`.
    """
    shape.check_one_view("labelled images")
    splits = splits_of(config)
    view = EvaluationView(np.array([len(splits.test)]), config.crop_pct)
    common = splits.names, shape.image_size, config.decode
    return LabelledImages(splits.test, splits.test_labels, *common, view, None)
