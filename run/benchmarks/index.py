"""From shard to index: this project's scan against Python's tarfile."""

import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from mug.data.builders.writers import write_tar
from mug.data.index.build import build_index

IMAGE = bytes.fromhex("ffd8ffe0") + bytes(1996)  # the scan looks at no more than an image's header
ROUNDS = 5


def metrics(folder: Path, samples: int = 20_000) -> list[dict]:
    """Returns samples a second, and the ratio to tarfile; readers take turns, the best round of each counts.

    The shard of small samples, in `folder`, is in the page cache.
    """
    shard = folder / "00000.tar"
    members = ((f"{i:09d}.{kind}", data) for i in range(samples) for kind, data in _files(i))
    write_tar(shard, members)
    readers: dict[str, Callable[[int], object]] = {
        "tarfile, names and offsets only": lambda i: _by_tarfile(shard),
        "index, rows written": lambda i: build_index([str(shard)], folder / f"index{i}", workers=1),
    }
    seconds = {name: [] for name in readers}
    for i in range(ROUNDS):
        for name, read in readers.items():
            start = time.perf_counter()
            read(i)
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(values) for name, values in seconds.items()}
    base = best["tarfile, names and offsets only"]
    return [{"reader": name, "samples/s": round(samples / best[name]), "ratio": base / best[name]} for name in readers]


def _files(i: int) -> list[tuple[str, bytes]]:
    return [("jpg", IMAGE), ("txt", b"a caption of number %d" % i), ("json", b'{"key": "%09d"}' % i)]


def _by_tarfile(shard: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(shard) as tar:
        return [(member.name, member.offset_data, member.size) for member in tar]
