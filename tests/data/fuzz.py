#!/usr/bin/env python3
"""Mutate real shards, images and captions, and account for each sample: used, replaced, or left out and said.

python tests/data/fuzz.py                          # 2,000 of each kind, some minutes
python tests/data/fuzz.py --inputs 50 --seed 7     # a short look

What is found at fault is raised with its kind and number, which with the seed make it again. A failure is a traceback,
a message of more than one line, an input that takes longer than SECONDS, or a sample that is in no count.
"""

import argparse
import contextlib
import io
import json
import logging
import signal
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mug.data.captions import choose
from mug.data.config import DataConfig
from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.data.errors import BadSample, DataError
from mug.data.index.build import Shard, build_index
from mug.data.index.index import Index
from mug.data.index.tar_samples import EMPTY, IMAGES, NO_IMAGE
from mug.data.reader import Reader

SECONDS = 20  # far more than any of these inputs takes
PAIRS = 8
Outcome = Counter[str]


def picture(i: int, format: str = "JPEG", **options) -> bytes:
    """A small image with smooth and random parts."""
    pixels = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    pixels[:12] = np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


IMAGE_SEEDS = [
    picture(0, quality=90),
    picture(1, progressive=True),
    picture(2, restart_marker_rows=1),
    picture(3, "PNG"),
    picture(4, "WEBP"),
    picture(5, "GIF"),
    picture(6, "BMP"),
    picture(7, "TIFF", compression="tiff_lzw"),
]


def pairs() -> list[tuple[str, bytes, bytes, bytes]]:
    """(key, image, caption, json)."""
    return [
        (
            f"{i:04d}",
            IMAGE_SEEDS[i],
            f"a hill, number {i}".encode(),
            json.dumps({"captions": {"de": f"Nr {i}"}}).encode(),
        )
        for i in range(PAIRS)
    ]


def tar_of(format: int, *extensions: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for key, image, text, meta in pairs():
            for extension, data in zip(extensions, (image, text, meta, b"3"), strict=True):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime = len(data), 0.5
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def table_of(kind: str) -> bytes:
    keys, images, texts, metas = zip(*pairs(), strict=True)
    table = pa.table({"key": keys, "image": images, "caption": [text.decode() for text in texts], "json": metas})
    buffer = io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, buffer, row_group_size=3)
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd" if kind == "compressed" else None)
        writer = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with writer(buffer, table.schema, options=options) as out:
            out.write_table(table, 3)
    return buffer.getvalue()


SEEDS: dict[str, list[bytes]] = {
    "tar": [
        *(tar_of(format, "jpg", "txt", "json", "cls") for format in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT)),
        tar_of(tarfile.GNU_FORMAT, "input.jpg", "output.txt", "json", "cls"),
        tar_of(tarfile.GNU_FORMAT, "jpg", "caption.txt", "json", "mask.png"),
    ],
    "parquet": [table_of("parquet")],
    "arrow": [table_of(kind) for kind in ("file", "stream", "compressed")],
    "image": IMAGE_SEEDS,
    "caption": [
        b"a red barn under snow",
        "Höhe 高 \N{SNOWMAN}".encode(),
        json.dumps({"caption": "a barn", "captions": {"de": ["eine Scheune", "Schnee"], "en": "barn"}}).encode(),
    ],
}


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """The bytes with one to four faults as disks, transfers and other programs make them."""
    bytes_ = bytearray(data)
    for _ in range(random.integers(1, 5)):
        at = int(random.integers(len(bytes_) + 1))
        length = int(min(random.integers(1, 700), len(bytes_) - at))
        match random.integers(7):
            case 0:
                bytes_[at : at + 1] = random.bytes(1)
            case 1:
                bytes_[at : at + length] = random.bytes(length)
            case 2:
                bytes_[at : at + length] = bytes(length)
            case 3:
                del bytes_[at : at + length]
            case 4:
                bytes_[at:at] = bytes_[: 512 * (length // 512 + 1)]
            case 5:
                del bytes_[at:]
            case 6:
                bytes_[at : at + 2] = random.choice([b"\xff\xff", b"\0\0", b"\x7f\xff", b"99"])
    return bytes(bytes_)


def _count_of_tar(path: Path, shard: Shard, index: Index) -> None:
    """Each regular file is part of a sample, of a key without an image, or is left out and said."""
    files, images, links = 0, {}, 0
    with tarfile.open(path) as archive:
        for member in archive:
            folder, slash, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if member.islnk() or member.issym():
                links += 1
            elif member.isreg() and member.name:
                files += 1
                if stem and extension.lower() in IMAGES:
                    images[folder + slash + stem] = member.size
    assert len(index) >= sum(size > 0 for size in images.values()), "samples are missing"
    rows = index.rows(0)
    used = sum(int((length >= 0).sum()) for length in (rows.image_length, rows.text_length, rows.json_length))
    keys = sum(shard.left_out.kinds.get(kind, (0, ""))[0] for kind in (NO_IMAGE, EMPTY))  # of one to three files
    alone = shard.left_out.count - keys - links
    assert keys <= files - used - alone <= 3 * keys, f"{shard.left_out}: not all that is left out"


def check_shard(data: bytes, kind: str, folder: Path) -> Outcome:
    """What became of the samples of a shard."""
    path = folder / f"shard.{kind}"
    path.write_bytes(data)
    try:
        (shard,) = build_index([str(path)], folder / "index", 0)
    except DataError as error:  # a shard without any image
        return Counter({_one_line(error, str(path)): 1})
    if shard.failure:
        return Counter({_one_line(shard.failure, str(path)): 1})
    outcome = Counter()
    reader = Reader.open(str(folder / "index"), DataConfig(cache=str(folder)))
    if kind == "tar" and data.endswith(bytes(1024)):  # Python's tarfile takes others for damaged
        _count_of_tar(path, shard, reader.index)
    if kind != "tar":
        whole = pq.read_table(path) if kind == "parquet" else _arrow(path)
        assert len(reader.index) + shard.left_out.count == len(whole), "rows are missing"
    for row in range(len(reader.index)):
        try:
            image, text, meta = reader.read(0, row)
            decode_crop(image, 16, CentralSquare())
            choose(text, meta, ("en", "de"), 0.0)
            outcome["used"] += 1
        except BadSample as error:
            _one_line(error)
            outcome["replaced"] += 1
    outcome["left out"] = shard.left_out.count
    return outcome


def _arrow(path: Path) -> pa.Table:
    data = path.read_bytes()
    return (pa.ipc.open_file if data.startswith(b"ARROW1") else pa.ipc.open_stream)(data).read_all()


def _one_line(error: object, name: str = "") -> str:
    assert "\n" not in str(error) and name in str(error), f"not one line that names the shard: {error!r}"
    return "shards refused by name"


def check_image(data: bytes, kind: str, folder: Path) -> Outcome:
    """Whether an image is used or replaced."""
    try:
        for mode in ("exact", "fast"):
            assert decode_crop(data, 4, CentralSquare(), mode).shape == (3, 4, 4)
        return Counter(used=1)
    except BadSample as error:
        _one_line(error)
        return Counter(replaced=1)


def check_caption(data: bytes, kind: str, folder: Path) -> Outcome:
    """Whether a caption is used, none or replaced, as .txt and as .json."""
    outcome = Counter()
    for parts in ((data, b""), (b"", data), (data, data)):
        try:
            caption = choose(*parts, ("en", "de"), 0.7)
            assert "\n" not in caption and caption.encode() is not None
            outcome["used" if caption else "no caption, said"] += 1
        except BadSample as error:
            _one_line(error)
            outcome["replaced"] += 1
    return outcome


CHECKS: dict[str, Callable[[bytes, str, Path], Outcome]] = {
    "tar": check_shard,
    "parquet": check_shard,
    "arrow": check_shard,
    "image": check_image,
    "caption": check_caption,
}


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError when the time is up."""

    def end(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(kind: str, inputs: int, seed: int) -> Outcome:
    """What became of `inputs` mutated inputs of a kind.

    Raises:
        AssertionError: one of them is in no count, hangs or ends in a traceback; it names the input.
    """
    return sum((check(kind, number, seed) for number in range(inputs)), Counter())


def check(kind: str, number: int, seed: int) -> Outcome:
    """What became of one of them.

    Raises:
        AssertionError: see `fuzz`.
    """
    random = np.random.default_rng([seed, [*SEEDS].index(kind), number])
    data = mutated(SEEDS[kind][number % len(SEEDS[kind])], random)
    try:
        with at_most(SECONDS), tempfile.TemporaryDirectory() as folder:
            return CHECKS[kind](data, kind, Path(folder))
    except Exception as error:
        raise AssertionError(f"{kind} {number} of seed {seed}: {type(error).__name__}: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=[*SEEDS], default=[*SEEDS])
    options = parser.parse_args()
    logging.getLogger("mug").setLevel(logging.ERROR)  # what each shard leaves out is in the counts
    for kind in options.kinds:
        found = fuzz(kind, options.inputs, options.seed)
        print(
            f"{kind}: {options.inputs:,} inputs;", ", ".join(f"{n:,} {what}" for what, n in found.items()), flush=True
        )


if __name__ == "__main__":
    main()
