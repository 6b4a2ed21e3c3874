"""The common parts of evaluations of frozen features: labelled images, and the encoders."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mug.data.labelled_sources import Source, open_splits
from mug.data.order import spread
from mug.data.store.expand import without_signatures
from mug.run.common.command_line import check_min
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import EvalConfig, EvalContext, Subject
from mug.run.evaluators.features import (
    EncoderFeatures,
    Features,
    PixelFeatures,
    features_of,
    principal_components,
    untrained_encoder,
)
from mug.run.evaluators.intervals import MAX_SEEDS


@dataclass(frozen=True, kw_only=True)
class FrozenConfig(EvalConfig):
    """Labelled images, and the encoder that is shown them.

    Args:
        data: FOLDER, 'SHARDS', fashion-mnist[:FOLDER] or openmoji: see data/labelled_sources.py.
        test: test images, where `data` does not hold them.
        label: key of the shards' json, or column of the dataset, that holds the class.
        max_train: training images to take, spread evenly over the set; without it, all.
        max_test: test images to take, likewise.
        encoder: checkpoint, the one that is evaluated; or a baseline: random (untrained), pixels, or components, the
            principal components of the training images' pixels, as many as the encoder is wide.
        seeds: runs with seeds 0, 1, …; mean and deviation are of these.
        hits: record which test images were right, by their digit 1 in a text, too: for paired comparisons.
    """

    data: str
    test: str | None = None
    label: str = "label"
    max_train: int | None = None
    max_test: int | None = None
    encoder: Literal["checkpoint", "random", "pixels", "components"] = "checkpoint"
    seeds: int = 1
    hits: bool = False

    def check(self) -> None:
        super().check()
        check_min(self, {"max_train": 1, "max_test": 1})
        if not 1 <= self.seeds <= MAX_SEEDS:
            raise RunError(f"seeds must lie between 1 and {MAX_SEEDS}, not be {self.seeds}")


@dataclass(frozen=True)
class LabelledSplits:
    """Images to learn from and to test on, and their classes, int64 0..C-1."""

    train: Source
    test: Source
    train_labels_N: Tensor
    test_labels_M: Tensor
    classes: int


def open_images(config: FrozenConfig, context: EvalContext) -> LabelledSplits:
    """Returns the images that the options name.

    Raises:
        DataError: see `open_splits`.
    """
    splits = open_splits(config.data, config.test, config.label, context.cache)
    train, train_labels_N = _thinned(splits.train, torch.from_numpy(splits.train_labels), config.max_train)
    test, test_labels_M = _thinned(splits.test, torch.from_numpy(splits.test_labels), config.max_test)
    return LabelledSplits(train, test, train_labels_N, test_labels_M, len(splits.names))


def _thinned(source: Source, labels_N: Tensor, wanted: int | None) -> tuple[Source, Tensor]:
    if wanted is None or wanted >= len(source):
        return source, labels_N
    numbers = spread(len(source), wanted)
    return source.select(numbers), labels_N[numbers]


@dataclass(frozen=True)
class Extracted:
    """The features of one encoder. `seeds` are those that it is used for: its own if it is random, else all."""

    seeds: range
    train: Features
    test: Features


def encoders(
    config: FrozenConfig, context: EvalContext, images: LabelledSplits, subject: Subject
) -> Iterator[Extracted]:
    """Yields the features of the encoder; of an untrained one for each seed in turn. A collective call."""
    seeds = range(config.seeds)
    for network, of_seeds in _networks(config.encoder, subject, seeds):
        train, test = (features_of(network, source, context) for source in (images.train, images.test))
        if config.encoder == "components":
            train, test = principal_components(train, test, subject.module.config.width)
        yield Extracted(of_seeds, train, test)


def _networks(encoder: str, subject: Subject, seeds: range) -> Iterator[tuple[nn.Module, range]]:
    size = subject.module.config.image_size
    if encoder in ("pixels", "components"):
        yield PixelFeatures(), seeds
    elif encoder == "checkpoint":
        yield EncoderFeatures(subject.whole.encoder, size), seeds
    else:
        for seed in seeds:
            yield EncoderFeatures(untrained_encoder(subject.whole, seed), size), range(seed, seed + 1)


def record_of(config: FrozenConfig, method: str, encoder: str) -> dict[str, Any]:
    """Returns the first keys of a record of results. encoder: the name of the one that is evaluated."""
    name = encoder if config.encoder == "checkpoint" else config.encoder
    return {"method": method, "encoder": name, "data": without_signatures(config.data)}
