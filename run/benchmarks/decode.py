"""From JPEG to batch: this project's decoder against PIL's, set up as in open_clip.

Each function returns rows, one dict a reader. Readers take turns, so that a machine whose speed drifts slows all
alike: compare rates only within one call.
"""

import io
import statistics
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import functional

from mug.data import rng
from mug.data.builders.writers import encoded, write_tar
from mug.data.crops import CROP_DRAWS, Box, Crop, RandomCrop
from mug.data.decode import Mode, decode_crop, fast_boxes
from mug.data.workers import worker_settings
from mug.run.common.errors import RunError
from mug.run.common.packages import load_package

SIZE = 224
DEBIAN = ("/usr/share/backgrounds/gnome", "/usr/share/wallpapers")  # gnome-backgrounds, plasma-workspace-wallpapers
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
PREFETCH = 2  # batches a worker


def photographs(folder: Path | None, width: int, height: int) -> list[bytes]:
    """Returns the JPEG and WebP files of a folder (Debian's wallpapers) that are larger than this, cut to it, as JPEGs.

    Saved as img2dataset does: quality 95, colour at half the resolution.

    Raises:
        RunError: there are none.
    """
    folders = [Path(name) for name in DEBIAN] if folder is None else [folder]
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in (".jpg", ".webp")]
    jpegs = []
    for path in paths:
        with Image.open(path, formats=("JPEG", "WEBP")) as image:
            if path.is_symlink() or image.width <= width or image.height <= height:
                continue
            cut = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
            jpegs.append(encoded(cut, "JPEG", quality=95))
    if not jpegs:
        raise RunError(
            f"no photograph larger than {width}x{height} in {', '.join(map(str, folders))}: give a folder of JPEGs,"
            " or install Debian's gnome-backgrounds and plasma-workspace-wallpapers"
        )
    return jpegs


def one_thread(jpegs: list[bytes], scale: tuple[float, float], rounds: int) -> list[dict]:
    """Returns images a second of one thread, and the mean absolute difference (of 255) from PIL on the same boxes.

    `ratio` is to open_clip's way, whose normalised floats are more than the uint8 of the others; `to uint8` to PIL's
    uint8. `error, drawn box` counts the mode "fast" moving the box to its grid too.
    """
    crops = [RandomCrop(scale, rng.uniform(0, rng.CROP, 0, i, CROP_DRAWS), flip=False) for i in range(len(jpegs))]
    readers: dict[str, Callable[[bytes, Crop], object]] = {
        "PIL as open_clip": lambda data, crop: _normalise(_pil_crop(data, crop)),
        "PIL to uint8": lambda data, crop: np.asarray(_pil_crop(data, crop)),
        "exact": lambda data, crop: decode_crop(data, SIZE, crop, "exact"),
        "fast": lambda data, crop: decode_crop(data, SIZE, crop, "fast"),
    }
    torch.set_num_threads(1)
    seconds = {name: [] for name in readers}
    for _ in range(1 + rounds):
        for name, read in readers.items():
            start = time.process_time()  # what others take of the core is not counted
            for data, crop in zip(jpegs, crops, strict=True):
                read(data, crop)
            seconds[name].append((time.process_time() - start) / len(jpegs))
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return [
        {
            "reader": name,
            "images/s": 1 / median[name],
            "ratio": median["PIL as open_clip"] / median[name],
            "to uint8": median["PIL to uint8"] / median[name],
        }
        | (_errors(jpegs, crops, name) if name in ("exact", "fast") else {})
        for name in readers
    ]


def _errors(jpegs: list[bytes], crops: list[RandomCrop], mode: Mode) -> dict[str, float]:
    own_box, drawn_box = [], []
    for data, crop in zip(jpegs, crops, strict=True):
        view = decode_crop(data, SIZE, crop, mode).transpose(1, 2, 0).astype(int)
        image = _pil_open(data)
        drawn = crop.box(*image.size)
        own = fast_boxes([drawn], image.size, SIZE)[1][0] if mode == "fast" else drawn
        own_box.append(np.abs(view - np.asarray(_pil_resize(image, own))).mean())
        drawn_box.append(np.abs(view - np.asarray(_pil_resize(image, drawn))).mean())
    return {"error": float(np.mean(own_box)), "error, drawn box": float(np.mean(drawn_box))}


def _pil_open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _pil_resize(image: Image.Image, box: Box) -> Image.Image:
    left, top, right, bottom = box
    bicubic = transforms.InterpolationMode.BICUBIC
    return functional.resized_crop(image, top, left, bottom - top, right - left, [SIZE, SIZE], bicubic)


def _pil_crop(data: bytes, crop: Crop) -> Image.Image:
    image = _pil_open(data)
    return _pil_resize(image, crop.box(*image.size))


def _normalise(image: Image.Image) -> torch.Tensor:
    return functional.normalize(functional.to_tensor(image), MEAN, STD)


def loaders(jpegs: list[bytes], folder: Path, scale: tuple[float, float], batches: int, workers: int) -> list[dict]:
    """Returns images a second of complete loaders, from tar shards that are written to `folder` to batches of 32.

    Each runs twice, in turns; the better is reported. `workers` processes, or threads where the name says so.
    """
    batch = 32
    paths = [folder / f"{shard:05d}.tar" for shard in range(workers)]  # webdataset gives each worker entire shards
    for path in paths:
        write_tar(path, ((f"{i:05d}.jpg", jpegs[i % len(jpegs)]) for i in range(batch * batches // workers)))
    ours = {mode: Batches(tuple(paths), batch, scale, mode) for mode in ("exact", "fast")}
    readers: dict[str, Callable[[], Iterable]] = {
        "webdataset and PIL as open_clip": lambda: _open_clip(paths, batch, scale, workers),
        "exact, processes": lambda: _processes(ours["exact"], workers),
        "exact, threads": lambda: _threads(ours["exact"], workers),
        "fast, processes": lambda: _processes(ours["fast"], workers),
        "fast, threads": lambda: _threads(ours["fast"], workers),
    }
    rate = dict.fromkeys(readers, 0.0)
    for _ in range(2):
        for name, start in readers.items():
            rate[name] = max(rate[name], _rate(start(), batch))
    base = rate["webdataset and PIL as open_clip"]
    return [{"reader": name, "images/s": rate[name], "ratio": rate[name] / base} for name in readers]


def _rate(loader: Iterable, batch: int) -> float:
    """Returns images a second from the first batch on: starting processes is not counted."""
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    return batch * sum(1 for _ in batches) / (time.perf_counter() - start)


def _open_clip(paths: list[Path], batch: int, scale: tuple[float, float], workers: int) -> DataLoader:
    preprocess = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    webdataset = load_package("webdataset", "bench")
    dataset = webdataset.DataPipeline(
        webdataset.SimpleShardList([str(path) for path in paths]),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.decode("pilrgb"),
        webdataset.to_tuple("jpg"),
        webdataset.map_tuple(preprocess),
        webdataset.batched(batch, partial=False),
    )
    return DataLoader(dataset, batch_size=None, prefetch_factor=PREFETCH, **worker_settings(workers))


@dataclass(frozen=True)
class Batches(Dataset):
    """number → uint8 [batch, 3, SIZE, SIZE], out of tar shards by offset."""

    paths: tuple[Path, ...]
    batch: int
    scale: tuple[float, float]
    mode: Mode

    def __post_init__(self):
        places = []  # path, offset and length of each image
        for path in self.paths:
            with tarfile.open(path) as tar:
                places += [(path, member.offset_data, member.size) for member in tar]
        object.__setattr__(self, "places", places)

    def __len__(self) -> int:
        return len(self.places) // self.batch

    def __getitem__(self, number: int) -> torch.Tensor:
        if number >= len(self):
            raise IndexError(number)
        return torch.stack([self._view(i) for i in range(number * self.batch, (number + 1) * self.batch)])

    def _view(self, i: int) -> torch.Tensor:
        path, offset, length = self.places[i]
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(length)
        crop = RandomCrop(self.scale, rng.uniform(0, rng.CROP, 0, i, CROP_DRAWS), flip=False)
        return torch.from_numpy(decode_crop(data, SIZE, crop, self.mode))


def _processes(batches: Batches, workers: int) -> DataLoader:
    return DataLoader(batches, batch_size=None, prefetch_factor=PREFETCH, **worker_settings(workers))


def _threads(batches: Batches, workers: int) -> Iterator[torch.Tensor]:
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = deque()
        for number in range(len(batches)):
            waiting.append(pool.submit(batches.__getitem__, number))
            if len(waiting) == PREFETCH * workers:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)
