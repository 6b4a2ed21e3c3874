"""Scenes and their annotations by place in the global order; what training changes about them.

Dimension letters: B batch, S side of what the model sees, H, W height and width of a whole image.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from mug.data import rng
from mug.data.config import DataConfig
from mug.data.errors import DataError
from mug.data.ledger import Replaced
from mug.data.order import Order
from mug.data.scenes import ensure_scenes
from mug.model.encoder import PIXEL_MEAN
from mug.model.segmenter import IGNORED
from mug.run.segmentation.recipe import SceneConfig, SegmentRecipe
from mug.run.training.errors import RunError

Batch = dict[str, Tensor]

IMAGES = (".jpg", ".jpeg", ".png")
CROP_TRIES = 10
MEAN = tuple(round(255 * mean) for mean in PIXEL_MEAN)  # what lies around an image that is smaller than the crop
# Draws of a view: scale, flip, two for each crop that is tried, and whether and how to change each of four colours.
DRAWS = 2 + 2 * CROP_TRIES + 2 * 4
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32 / 255, (0.5, 1.5), (0.5, 1.5), 18 / 360  # mmsegmentation's


@dataclass(frozen=True, eq=False)
class Scenes:
    """Images and annotations of one split, by the alphabet."""

    images: list[Path]
    annotations: list[Path]
    classes: int
    reduce_zero_label: bool

    def __len__(self) -> int:
        return len(self.images)

    def read(self, number: int) -> tuple[Image.Image, np.ndarray]:
        """The image, RGB, and its labels, uint8 [H, W]: 0..classes-1, or 255.

        Raises:
            DataError: a file cannot be read, they differ in size, or a label is out of range; names the file.
        """
        try:
            image = Image.open(self.images[number]).convert("RGB")
            labels_HW = np.array(Image.open(self.annotations[number]))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{self.images[number]} or its annotation cannot be read ({error}); fetch it anew"
            ) from None
        path = self.annotations[number]
        if labels_HW.dtype != np.uint8 or labels_HW.shape != (image.height, image.width):
            raise DataError(f"{path} must have one byte for each of the image's {image.height} x {image.width} pixels")
        if self.reduce_zero_label:
            labels_HW = np.where(labels_HW == 0, IGNORED, labels_HW - (labels_HW != IGNORED)).astype(np.uint8)
        most = labels_HW[labels_HW != IGNORED].max(initial=0)
        if most >= self.classes:
            raise DataError(f"{path}: class {most} is out of range, model.classes is {self.classes}, counted from 0")
        return image, labels_HW

    def fingerprint(self) -> str:
        """SHA-256 of the files' names and sizes."""
        stats = [(path.name, path.stat().st_size) for path in (*self.images, *self.annotations)]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def open_scenes(recipe: SegmentRecipe, split: str) -> Scenes:
    """One split, training or validation, of the folder that the recipe names, or of the embedded scenes.

    Raises:
        RunError: no such folder, no images, or an image without annotation.
    """
    data = recipe.data
    folder = Path(data.folder) if data.folder else ensure_scenes(DataConfig(cache=data.cache).cache_folder())
    inside = folder / "images" / split
    images = sorted(path for path in inside.glob("*") if path.suffix.lower() in IMAGES)
    if not images:
        raise RunError(f"{inside} holds no images; give a folder with images/{split} and annotations/{split}")
    annotations = [folder / "annotations" / split / f"{path.stem}.png" for path in images]
    if missing := [path for path in annotations if not path.is_file()]:
        raise RunError(f"{missing[0]} is missing ({len(missing)} of {len(images)} images have no annotation)")
    return Scenes(images, annotations, recipe.model.classes, data.reduce_zero_label)


@dataclass(frozen=True)
class SceneView:
    order: Order


@dataclass(frozen=True, eq=False)
class TrainScenes:
    """Random views of the scenes, functions of (seed, epoch, position) alone: what mug.data.stream reads."""

    scenes: Scenes
    size: int
    config: SceneConfig
    view: SceneView

    @staticmethod
    def open(recipe: SegmentRecipe) -> "TrainScenes":
        """The training split; see open_scenes."""
        scenes = open_scenes(recipe, "training")
        order = Order(np.array([len(scenes)]), recipe.seed)
        return TrainScenes(scenes, recipe.model.encoder.image_size, recipe.data, SceneView(order))

    def __len__(self) -> int:
        return len(self.scenes)

    def identity(self) -> dict[str, str]:
        """What a position's sample depends on, beside the order."""
        return {"fingerprint": self.scenes.fingerprint()}

    def batch(self, positions: Sequence[int]) -> tuple[Batch, list[Replaced]]:
        """`image` uint8 [B, 3, S, S], `labels` int64 [B, S, S], `position` int64 [B]; none stands in for another."""
        position_B = np.asarray(positions, dtype=np.int64)
        epoch_B, _, number_B = self.view.order.locate(position_B)
        views = []
        for position, epoch, number in zip(position_B.tolist(), epoch_B.tolist(), number_B.tolist(), strict=True):
            draws = rng.uniform(self.view.order.seed, rng.AUGMENT, epoch, position, DRAWS)
            views.append(augment(*self.scenes.read(number), self.size, self.config, draws))
        images, labels = zip(*views, strict=True)
        image_B3SS, labels_BSS = torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)).long()
        return {"image": image_B3SS, "labels": labels_BSS, "position": torch.from_numpy(position_B)}, []


@dataclass(frozen=True, eq=False)
class WholeScenes:
    """Validation scenes, whole: shorter side to S, labels as they are."""

    scenes: Scenes
    size: int

    def batch(self, positions: Sequence[int]) -> tuple[Batch, list[Replaced]]:
        """`image` uint8 [1, 3, H', W'] of the one position, and its `labels`, int64 [H, W]."""
        image, labels_HW = self.scenes.read(positions[0])
        image = resized(image, self.size / min(image.size))
        pixels_13HW = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous()
        return {"image": pixels_13HW, "labels": torch.from_numpy(labels_HW).long()}, []


# --- What training changes ---------------------------------------------------------------------------------


def augment(
    image: Image.Image, labels_HW: np.ndarray, size: int, config: SceneConfig, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A random view, uint8 [3, S, S] and [S, S]: scaled, cropped, mirrored, its colours changed.

    Around an image that is too small lies the mean colour, which does not count.
    """
    low, high = config.scale
    image = resized(image, (low + draws[0] * (high - low)) * size / min(image.size))
    labels = Image.fromarray(labels_HW).resize(image.size, Image.Resampling.NEAREST)
    box = choose_crop(np.asarray(labels), size, config.category_share, draws[2 : 2 + 2 * CROP_TRIES].reshape(-1, 2))
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
    labels_HW: np.ndarray, size: int, category_share: float, draws_K2: np.ndarray
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) inside the image: the first of which no class has `category_share` or more."""
    height, width = labels_HW.shape
    h, w = min(size, height), min(size, width)
    for u_left, u_top in draws_K2.tolist():
        left, top = int(u_left * (width - w + 1)), int(u_top * (height - h + 1))
        part_hw = labels_HW[top : top + h, left : left + w]
        counts = np.bincount(part_hw[part_hw != IGNORED], minlength=2)
        if np.count_nonzero(counts) > 1 and counts.max() < category_share * counts.sum():
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
