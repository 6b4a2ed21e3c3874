"""Debian's Fashion-MNIST: 60,000 + 10,000 grey pictures of clothes, 28 x 28 px, in ten classes; also as pairs.

The four files are in the idx format of MNIST: two zeros, type 8, the rank, each dimension, the values.
"""

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mug.data.builders.writers import Sample, encoded
from mug.data.errors import DataError

INSTALLED = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
SPLITS = ("train", "t10k")
NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
NOUNS = ("T-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TEMPLATES = ("a photo of {}", "{}", "a small grey picture of {}", "{} on a black ground", "this is {}")


def read_pixels(folder: Path, split: str) -> np.ndarray:
    """Returns uint8 [N, 28, 28], white on black.

    Raises:
        DataError: the file is missing or damaged.
    """
    return _read_idx(folder / f"{split}-images-idx3-ubyte.gz", rank=3)


def read_labels(folder: Path, split: str, images: int) -> np.ndarray:
    """Returns uint8 [N], an index into NAMES each, of so many images.

    Raises:
        DataError: the file is missing or damaged, or does not fit the images; or a label is out of range.
    """
    path = folder / f"{split}-labels-idx1-ubyte.gz"
    labels_N = _read_idx(path, rank=1)
    if len(labels_N) != images:
        raise DataError(f"'{path}' holds {len(labels_N)} labels for {images} images: fetch it again")
    if labels_N.max(initial=0) >= len(NAMES):
        raise DataError(f"'{path}' holds the label {labels_N.max()}, out of range: there are {len(NAMES)} classes")
    return labels_N


def _read_idx(path: Path, rank: int) -> np.ndarray:
    try:
        data = gzip.decompress(path.read_bytes())
        if data[:4] != bytes((0, 0, 8, rank)):
            raise ValueError("not an idx file of bytes of that rank")
        shape = np.frombuffer(data, ">i4", rank, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except FileNotFoundError:
        raise DataError(
            f"'{path}' is missing: install Debian's dataset-fashion-mnist, or unpack it and give its folder"
        ) from None
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read ({error}): fetch it again") from None


def as_png(pixels_HW: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels_HW), compress_level=1)


def captions_of(label: int) -> list[str]:
    """Returns the captions of a picture of this class."""
    noun = NOUNS[label]
    return [template.format(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}") for template in TEMPLATES]


def fashion_mnist_pairs(folder: Path, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the pictures whose key (`train/00000`, `t10k/00000`, …) is wanted, captioned by class, as is `label`."""
    for split in SPLITS:
        pixels_NHW = read_pixels(folder, split)
        labels_N = read_labels(folder, split, len(pixels_NHW))
        for number, label in enumerate(labels_N.tolist()):
            key = f"{split}/{number:05d}"
            if wanted(key):
                captions = captions_of(label)
                meta = {"key": key, "caption": captions[0], "captions": {"en": captions}, "label": NAMES[label]}
                yield Sample(key, as_png(pixels_NHW[number]), "png", captions[0], meta | {"license": "MIT"})
