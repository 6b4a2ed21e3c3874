"""Scenes and their annotations by place in the global order; what training changes about them.

Dimension letters: B batch, S side of what the model sees, H, W height and width of a full image.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from mug.data import rng
from mug.data.bad_samples import Replacement
from mug.data.builders.image_files import image_files
from mug.data.builders.openmoji_scenes import ensure_scenes
from mug.data.config import DataConfig
from mug.data.errors import DataError
from mug.data.kinds.samples import Batch, Shape
from mug.data.left_out import LeftOut
from mug.data.order import Order
from mug.data.pixels import PIXEL_MEAN

IGNORED = 255  # the label of pixels that do not count
CROP_TRIES = 10
MEAN = tuple(round(255 * mean) for mean in PIXEL_MEAN)  # the padding around an image that is smaller than the crop
# Draws of a view: scale, flip, two for each crop that is tried, and whether and how to change each of four colours.
DRAWS = 2 + 2 * CROP_TRIES + 2 * 4
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32 / 255, (0.5, 1.5), (0.5, 1.5), 18 / 360  # mmsegmentation's


@dataclass(frozen=True)
class SceneConfig:
    """Where the scenes come from and how they are read.

    Args:
        folder: images/ and annotations/, each with training/ and validation/, as ADE20K has them: JPEG or PNG, and
            PNG of one byte a pixel, 255 not counting. Without it, OpenMoji's drawings, composed.
        classes: Number of classes that labels may name.
        reduce_zero_label: Annotations hold 0 where nothing is labelled and number the classes from 1, as ADE20K's.
        cache: Folder for what is built once. Without it, $MUG_CACHE, else ~/.cache/mug.
        scale: Min and max factor on the image, whose shorter side is model.image_size before, in training.
        cat_max_ratio: A training crop is redrawn, up to ten times, while one class has more than this share.
        flip: Mirror half of the training images.
        distort: Change brightness, contrast, saturation and hue in training, each of half of the images.
        workers: Processes per rank that read and change images; 0 works in the training process itself.
    """

    folder: str | None = None
    classes: int = 150
    reduce_zero_label: bool = False
    cache: str | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    flip: bool = True
    distort: bool = True
    workers: int = 2

    def __post_init__(self):
        low, high = self.scale
        if not 0 < low <= high:
            raise DataError(f"data.scale is {self.scale}; give 0 < min <= max")
        if not 0 < self.cat_max_ratio <= 1:
            raise DataError(f"data.cat_max_ratio must be more than 0 and at most 1, not {self.cat_max_ratio}")
        if not 2 <= self.classes <= IGNORED:
            raise DataError(f"data.classes must lie between 2 and {IGNORED}, not be {self.classes}: labels are bytes")
        if self.workers < 0:
            raise DataError(f"data.workers must be at least 0, not {self.workers}")


Config = SceneConfig


@dataclass(frozen=True, eq=False)
class Scenes:
    """Images and annotations of one split, in alphabetical order."""

    images: list[Path]
    annotations: list[Path]
    classes: int
    reduce_zero_label: bool

    def __len__(self) -> int:
        return len(self.images)

    def read(self, number: int) -> tuple[Image.Image, np.ndarray]:
        """Returns the image, RGB, and its labels, uint8 [H, W]: 0..classes-1, or 255.

        Raises:
            DataError: a file cannot be read, they differ in size, or a label is out of range; names the file.
        """
        try:
            image = Image.open(self.images[number]).convert("RGB")
            labels_HW = np.array(Image.open(self.annotations[number]))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{self.images[number]} or its annotation cannot be read ({error}); fetch it again"
            ) from None
        path = self.annotations[number]
        if labels_HW.dtype != np.uint8 or labels_HW.shape != (image.height, image.width):
            raise DataError(f"{path} must have one byte for each of the image's {image.height} x {image.width} pixels")
        if self.reduce_zero_label:
            labels_HW = np.where(labels_HW == 0, IGNORED, labels_HW - (labels_HW != IGNORED)).astype(np.uint8)
        largest = labels_HW[labels_HW != IGNORED].max(initial=0)
        if largest >= self.classes:
            raise DataError(f"{path}: class {largest} is out of range, data.classes is {self.classes}, counted from 0")
        return image, labels_HW

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the files' names and sizes."""
        stats = [(path.name, path.stat().st_size) for path in (*self.images, *self.annotations)]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def open_scenes(data: SceneConfig, split: str) -> Scenes:
    """Opens one split, training or validation, of the folder that is named, or of the embedded scenes.

    Raises:
        DataError: the folder does not exist, or holds no images, or an image without annotation.
    """
    folder = Path(data.folder) if data.folder else ensure_scenes(DataConfig(cache=data.cache).cache_folder())
    inside, labels = folder / "images" / split, folder / "annotations" / split
    left_out = LeftOut()
    images = image_files(inside, left_out) if inside.is_dir() else []
    if not images:
        raise DataError(f"{inside} does not hold images; give a folder with images/{split} and annotations/{split}")
    by_name = _annotations(labels, left_out)
    names = [path.relative_to(inside).with_suffix("") for path in images]
    if missing := [labels / f"{name}.png" for name in names if name not in by_name]:
        raise DataError(f"{missing[0]} is missing ({len(missing)} of {len(images)} images have no annotation)")
    for name in sorted(by_name.keys() - set(names)):
        left_out.add("annotations without an image", f"'{by_name[name]}'")
    left_out.report(folder)
    return Scenes(images, [by_name[name] for name in names], data.classes, data.reduce_zero_label)


def _annotations(folder: Path, left_out: LeftOut) -> dict[Path, Path]:
    """Returns path inside the folder, without the suffix → PNG."""
    found = image_files(folder, left_out) if folder.is_dir() else []
    for path in found:
        if path.suffix.lower() != ".png":
            left_out.add("annotations that are not PNG", f"'{path}'")
    return {path.relative_to(folder).with_suffix(""): path for path in found if path.suffix.lower() == ".png"}


@dataclass(frozen=True, eq=False)
class _SplitSamples:
    """What the samples of both splits have in common: mug.data.kinds.samples.Samples but for `order` and `batch`."""

    scenes: Scenes
    size: int

    kind: ClassVar[str] = "scenes"
    tokenizer: ClassVar[None] = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Returns the classes' numbers: annotations do not name them."""
        return tuple(map(str, range(self.scenes.classes)))

    def __len__(self) -> int:
        """Returns the number of scenes."""
        return len(self.scenes)

    def identity(self) -> dict[str, str]:
        """Returns what a position's sample depends on, besides the order."""
        return {"fingerprint": self.scenes.fingerprint()}

    def files(self) -> dict[str, str]:
        """Returns what a checkpoint keeps, by file name: nothing."""
        return {}


@dataclass(frozen=True, eq=False)
class TrainScenes(_SplitSamples):
    """Random views of the scenes, functions of (seed, epoch, position) only."""

    config: SceneConfig
    order: Order

    def batch(self, positions: Sequence[int]) -> tuple[Batch, list[Replacement]]:
        """Returns `image` uint8 [B, 3, S, S], `labels` int64 [B, S, S] and `position` int64 [B]; none stands in for
        another."""
        position_B = np.asarray(positions, dtype=np.int64)
        epoch_B, _, number_B = self.order.locate(position_B)
        views = []
        for position, epoch, number in zip(position_B.tolist(), epoch_B.tolist(), number_B.tolist(), strict=True):
            draws = rng.uniform(self.order.seed, rng.AUGMENT, epoch, position, DRAWS)
            views.append(augment(*self.scenes.read(number), self.size, self.config, draws))
        images, labels = zip(*views, strict=True)
        image_B3SS, labels_BSS = torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)).long()
        tensors = {"image": image_B3SS, "labels": labels_BSS, "position": torch.from_numpy(position_B)}
        return Batch(self.kind, tensors), []


@dataclass(frozen=True, eq=False)
class WholeScenes(_SplitSamples):
    """Full validation scenes by number: shorter side to S, labels unchanged. A batch is of one scene."""

    order: ClassVar[None] = None

    def batch(self, positions: Sequence[int]) -> tuple[Batch, list[Replacement]]:
        """Returns `image` uint8 [1, 3, H', W'] of the one position, and its `labels`, int64 [H, W]."""
        (number,) = positions
        image, labels_HW = self.scenes.read(number)
        image = resized(image, self.size / min(image.size))
        pixels_13HW = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous()
        return Batch(self.kind, {"image": pixels_13HW, "labels": torch.from_numpy(labels_HW).long()}), []


def open_train(config: SceneConfig, seed: int, shape: Shape) -> TrainScenes:
    """Returns the training split; see `open_scenes`."""
    shape.check_one_view("scenes")
    scenes = open_scenes(config, "training")
    return TrainScenes(scenes, shape.image_size, config, Order(np.array([len(scenes)]), seed))


def open_held_out(config: SceneConfig, shape: Shape) -> WholeScenes:
    """Returns the validation split; see `open_scenes`."""
    shape.check_one_view("scenes")
    return WholeScenes(open_scenes(config, "validation"), shape.image_size)


# --- What training changes ---------------------------------------------------------------------------------


def augment(
    image: Image.Image, labels_HW: np.ndarray, size: int, config: SceneConfig, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a random view, uint8 [3, S, S] and [S, S]: scaled, cropped, mirrored, its colours changed.

    An image that is too small is padded with the mean colour, which does not count.
    """
    low, high = config.scale
    image = resized(image, (low + draws[0] * (high - low)) * size / min(image.size))
    labels = Image.fromarray(labels_HW).resize(image.size, Image.Resampling.NEAREST)
    box = choose_crop(np.asarray(labels), size, config.cat_max_ratio, draws[2 : 2 + 2 * CROP_TRIES].reshape(-1, 2))
    view, labels_SS = Image.new("RGB", (size, size), MEAN), np.full((size, size), IGNORED, np.uint8)
    view.paste(image.crop(box))
    found_hw = np.asarray(labels.crop(box))
    labels_SS[: found_hw.shape[0], : found_hw.shape[1]] = found_hw
    pixels_3SS = np.asarray(view).transpose(2, 0, 1)
    if config.distort:
        pixels_3SS = distorted(torch.from_numpy(pixels_3SS.copy()), draws[-8:].reshape(4, 2)).numpy()
    turn = slice(None, None, -1 if config.flip and draws[1] < 0.5 else 1)
    return np.ascontiguousarray(pixels_3SS[..., turn]), np.ascontiguousarray(labels_SS[:, turn])


def resized(image: Image.Image, factor: float) -> Image.Image:
    width, height = (max(1, round(factor * side)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def choose_crop(
    labels_HW: np.ndarray, size: int, cat_max_ratio: float, draws_K2: np.ndarray
) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) inside the image: the first of which no class has `cat_max_ratio` or more."""
    height, width = labels_HW.shape
    h, w = min(size, height), min(size, width)
    left = top = 0
    for u_left, u_top in draws_K2.tolist():
        left, top = int(u_left * (width - w + 1)), int(u_top * (height - h + 1))
        part_hw = labels_HW[top : top + h, left : left + w]
        counts = np.bincount(part_hw[part_hw != IGNORED], minlength=2)
        if np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum():
            break
    return left, top, left + w, top + h


def distorted(image_3SS: Tensor, draws_42: np.ndarray) -> Tensor:
    """Brightness, contrast, saturation and hue, each changed where its first draw is below a half."""
    asked = (draws_42[:, 0] < 0.5).tolist()
    brightness, contrast, saturation, hue = draws_42[:, 1].tolist()
    if asked[0]:
        shifted = image_3SS.float() + 255 * BRIGHTNESS * (2 * brightness - 1)
        image_3SS = shifted.round().clamp(0, 255).to(torch.uint8)
    if asked[1]:
        image_3SS = v2.functional.adjust_contrast(image_3SS, _between(CONTRAST, contrast))
    if asked[2]:
        image_3SS = v2.functional.adjust_saturation(image_3SS, _between(SATURATION, saturation))
    if asked[3]:
        image_3SS = v2.functional.adjust_hue(image_3SS, HUE * (2 * hue - 1))
    return image_3SS


def _between(bounds: tuple[float, float], draw: float) -> float:
    return bounds[0] + draw * (bounds[1] - bounds[0])
