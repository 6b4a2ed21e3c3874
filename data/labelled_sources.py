"""Labelled images to evaluate an encoder on, from wherever people keep them.

    FOLDER                a folder per class
    FOLDER                a Hugging Face dataset, as `save_to_disk` leaves it
    'shards/*.tar'        tar shards whose json holds the label (--label names the key)
    fashion-mnist:FOLDER  the four idx files, as Debian's dataset-fashion-mnist installs them; FOLDER may be left out
    openmoji              the embedded pairs

A source that holds both splits gives both; else the test images are named separately.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mug.data.builders import fashion_mnist
from mug.data.builders.image_files import folders_in, image_files
from mug.data.builders.openmoji import ensure_openmoji
from mug.data.config import DataConfig
from mug.data.crops import CentralSquare, Crop
from mug.data.decode import Mode, decode_crop
from mug.data.errors import BadSample, DataError
from mug.data.left_out import LeftOut
from mug.data.reader import Reader

TEST_NAMES = ("test", "val", "validation")  # the first that a source has
CENTRAL = CentralSquare()


class Images(Protocol):
    """Encoded images by number. Cheap to pickle, for the processes that decode them."""

    def read(self, number: int) -> bytes:
        """Returns the bytes of an image."""

    def name(self, number: int) -> str:
        """Returns its name for a message."""


@dataclass(frozen=True)
class Source:
    """One split as its owner keeps it: images and their classes, by name.

    fingerprint: SHA-256 that changes with the images (of files: with names and sizes); not with their labels, nor
        when files are copied or touched. A run resumes by it.
    stamp: SHA-256 that changes with the files' times, too, where there are files. What costs only time to recompute,
        such as features, is cached by it.
    """

    images: Images
    labels: list[str]
    fingerprint: str
    stamp: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def view(self, number: int, size: int, crop: Crop = CENTRAL, mode: Mode = "exact") -> np.ndarray:
        """Returns the part `crop` as uint8 [3, size, size], bicubic, up- or downscaled; grey becomes RGB.

        Raises:
            DataError: the image cannot be read or decoded; it is named.
        """
        try:
            return decode_crop(self.images.read(number), size, crop, mode)
        except (BadSample, OSError) as error:
            why = error.strerror or error if isinstance(error, OSError) else error
            raise DataError(f"{self.images.name(number)}: {why}; fix or remove it") from error

    def select(self, numbers: list[int]) -> "Source":
        """Returns only the images of these numbers."""
        digests = (hashlib.sha256(f"{of} {numbers}".encode()).hexdigest() for of in (self.fingerprint, self.stamp))
        return Source(Selected(self.images, numbers), [self.labels[n] for n in numbers], *digests)


@dataclass(frozen=True)
class Splits:
    """Two splits whose labels (int64 [N]) number the same classes."""

    train: Source
    test: Source
    names: list[str]
    train_labels: np.ndarray
    test_labels: np.ndarray


def open_splits(data: str, test: str | None, label: str, cache: str | None) -> Splits:
    """Returns the images to train and to test on; see the head of this file for what `data` and `test` may be.

    Args:
        label: key of the json, or column of the dataset, that holds the class.
        cache: folder of the embedded pairs, None for the default.

    Raises:
        DataError: a source is missing, or a class is empty, unknown or the only one.
    """
    kind, _, where = data.partition(":")
    if kind == "fashion-mnist":
        train, test_source = (
            open_fashion_mnist(Path(where or fashion_mnist.INSTALLED), split) for split in ("train", "t10k")
        )
    elif data == "openmoji":
        train, test_source = open_openmoji(cache)
    else:
        inside = [] if test else [name for name in TEST_NAMES if (Path(data) / name).is_dir()]
        if not test and not inside:
            raise DataError(
                f"{data} has no folder {', '.join(TEST_NAMES)}; give the test images, too (--test or --data.test)"
            )
        train = open_source(f"{data}/train" if inside else data, label, cache)
        test_source = open_source(test or f"{data}/{inside[0]}", label, cache)
    return align(train, test_source)


def align(train: Source, test: Source) -> Splits:
    """Number the classes of the training images, in the order of their names.

    Raises:
        DataError: a test image of a class that has no training image, or fewer than two classes.
    """
    names = sorted(set(train.labels))
    if len(names) < 2:
        raise DataError(f"the training images are all of one class ({', '.join(names)}); give at least two")
    number = {name: i for i, name in enumerate(names)}
    for i, name in enumerate(test.labels):
        if name not in number:
            raise DataError(
                f"{test.images.name(i)}: its label '{name}' is not one of the training images' {len(names)} classes"
            )
    labels = (np.array([number[name] for name in source.labels]) for source in (train, test))
    return Splits(train, test, names, *labels)


def open_source(place: str, label: str, cache: str | None) -> Source:
    """Returns one split: a dataset on disk, a folder per class, or shards."""
    folder = Path(place)
    if (folder / "state.json").is_file():
        return open_saved_dataset(folder, label)
    return open_folder(folder) if folder.is_dir() else open_shards(place, label, cache)


# --- The kinds of sources ----------------------------------------------------------------------------------


def open_folder(folder: Path) -> Source:
    """FOLDER/CLASS/**/IMAGE, by the rule of mug.data.builders.image_files; what is left out is logged.

    Raises:
        DataError: a class without an image, no class, or a broken link.
    """
    paths, labels, left_out = [], [], LeftOut()
    for inside in folders_in(folder, left_out):
        found = image_files(inside, left_out)
        if not found:
            raise DataError(f"class folder {inside} does not hold an image; fill it or remove it")
        paths += found
        labels += [inside.name] * len(found)
    left_out.report(folder)
    if not paths:
        raise DataError(f"{folder} does not hold class folders; give a folder per class, with the images in it")
    try:
        stats = [(str(path.relative_to(folder)), path.stat()) for path in paths]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; fix or remove it") from None
    sizes = [(name, stat.st_size) for name, stat in stats]
    times = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    digests = (hashlib.sha256(json.dumps(facts).encode()).hexdigest() for facts in (sizes, times))
    return Source(Files([str(path) for path in paths]), labels, *digests)


def open_shards(patterns: str, label: str, cache: str | None) -> Source:
    """Shards, tar, Arrow or Parquet, whose samples have a json with the key `label`.

    Raises:
        DataError: missing or damaged shards, or a sample without a label.
    """
    images = InShards(Reader.open(patterns, DataConfig(cache=cache)))
    labels = []
    for number in range(len(images.reader.index)):
        try:
            labels.append(str(json.loads(images.reader.read_json(*images.place(number)))[label]))
        except (ValueError, KeyError, TypeError):
            name = images.name(number)
            raise DataError(
                f"{name}: its json has no '{label}'; give the label's key (--label or --data.label)"
            ) from None
    return Source(images, labels, images.reader.index.fingerprint)


def open_openmoji(cache: str | None) -> tuple[Source, Source]:
    """The embedded pairs, labelled by emoji without its variant (skin tones); a held-out variant of an emoji that
    has no other one cannot be distinguished from training images, and is left out."""
    folder = ensure_openmoji(DataConfig(cache=cache).cache_folder())
    train, test = (open_shards(f"{folder}/{split}-*.tar", "group", cache) for split in ("train", "held_out"))
    known = set(train.labels)
    return train, test.select([i for i, name in enumerate(test.labels) if name in known])


def open_saved_dataset(folder: Path, label: str) -> Source:
    """A Hugging Face dataset on disk, read through Arrow: its first image column, and `label`.

    Raises:
        DataError: no such column, a label out of range, or images that are not in the files.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        features = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))["features"]
        table = _read_table([folder / file["filename"] for file in state["_data_files"]])
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{folder} is not a dataset that save_to_disk wrote ({error})") from None
    column = next((name for name, kind in features.items() if kind.get("_type") == "Image"), None)
    if column is None or label not in features:
        raise DataError(f"{folder} has the columns {', '.join(features)}; it needs an image, and --label must be one")
    labels = _class_names(table[label].to_pylist(), features[label].get("names"), folder)
    images = InTable([folder / file["filename"] for file in state["_data_files"]], column)
    if images.column.null_count:
        raise DataError(f"{folder}: column {column} holds paths, not images; save it with the images embedded")
    digest = hashlib.sha256(f"{state['_fingerprint']} {len(table)} {column}".encode()).hexdigest()
    return Source(images, labels, digest)


def _read_table(paths: list[Path]) -> pa.Table:
    streams = [pa.ipc.open_stream(pa.memory_map(str(path))) for path in paths]
    return pa.concat_tables(stream.read_all() for stream in streams)


def _class_names(values: list, names: list[str] | None, folder: Path) -> list[str]:
    if names is None:
        return [str(value) for value in values]
    for row, value in enumerate(values):
        if value is None or not 0 <= value < len(names):
            raise DataError(
                f"{folder}, row {row}: label {value} is out of range, the dataset names {len(names)} classes"
            )
    return [names[value] for value in values]


def open_fashion_mnist(folder: Path, split: str) -> Source:
    """Returns images of 28 x 28 px, grey (white on black), 10 classes; 60,000 images in `train`, 10,000 in `t10k`.

    Raises:
        DataError: a file is missing or damaged, or a label is out of range.
    """
    pixels_NHW = fashion_mnist.read_pixels(folder, split)
    labels_N = fashion_mnist.read_labels(folder, split, len(pixels_NHW))
    digest = hashlib.sha256(pixels_NHW.tobytes()).hexdigest()
    return Source(InIdx(folder, split), [fashion_mnist.NAMES[label] for label in labels_N], digest)


# --- Their images ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """Images in files, one each."""

    paths: list[str]  # every worker gets a copy: a million Paths would take it ten seconds

    def read(self, number: int) -> bytes:
        return Path(self.paths[number]).read_bytes()

    def name(self, number: int) -> str:
        return self.paths[number]


@dataclass(frozen=True)
class InShards:
    """Samples of shards, in the order of the shards."""

    reader: Reader

    def place(self, number: int) -> tuple[int, int]:
        """Returns shard and row."""
        starts_S1 = self.reader.index.starts_S1
        shard = int(starts_S1.searchsorted(number, side="right")) - 1
        return shard, number - int(starts_S1[shard])

    def read(self, number: int) -> bytes:
        return self.reader.read(*self.place(number))[0]

    def name(self, number: int) -> str:
        return self.reader.index.name(*self.place(number))


@dataclass(frozen=True)
class InTable:
    """A column of the Arrow files of a Hugging Face dataset."""

    paths: list[Path]
    name_of_column: str

    @cached_property
    def column(self) -> pa.ChunkedArray:
        images = _read_table(self.paths)[self.name_of_column]
        return pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images

    def __reduce__(self):
        return InTable, (self.paths, self.name_of_column)

    def read(self, number: int) -> bytes:
        return self.column[number].as_py()

    def name(self, number: int) -> str:
        return f"{self.paths[0].parent}, row {number}"


@dataclass(frozen=True)
class InIdx:
    """The images of an idx file, as PNGs."""

    folder: Path
    split: str

    @cached_property
    def pixels_NHW(self) -> np.ndarray:
        return fashion_mnist.read_pixels(self.folder, self.split)

    def __reduce__(self):
        return InIdx, (self.folder, self.split)

    def read(self, number: int) -> bytes:
        return fashion_mnist.as_png(self.pixels_NHW[number])

    def name(self, number: int) -> str:
        return f"{self.folder}, {self.split} image {number}"


@dataclass(frozen=True)
class Selected:
    """Some of another source's images."""

    images: Images
    numbers: list[int]

    def read(self, number: int) -> bytes:
        return self.images.read(self.numbers[number])

    def name(self, number: int) -> str:
        return self.images.name(self.numbers[number])
