#!/usr/bin/env python3
"""Time the data pipeline: decoding and loading, indexing, the order of samples at scale, a long run's memory.

python run/bench_data.py                                        # against webdataset and PIL as in open_clip
python run/bench_data.py --scale 200000000 --shards 20000       # planning and seeking
python run/bench_data.py --soak 10000                           # memory and open files over 10,000 steps
"""

import tempfile
from pathlib import Path

from jsonargparse import Namespace
from rich.table import Table

from mug.data.config import DataConfig
from mug.data.kinds import pairs
from mug.data.kinds.samples import Shape
from mug.data.stream import BatchShard, TrainStream
from mug.run.benchmarks import decode, index, order, soak
from mug.run.common.command_line import Parser, check_min
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RunError
from mug.run.common.packages import load_package

SIZES = ((500, 400), (1024, 768))
SCALE = (0.2, 1.0)  # of the random crops, as MAE's


def main(console: Console) -> None:
    options = parse()
    if options.scale:
        rows = [{"metric": name, "value": value} for name, value in order.metrics(options.scale, options.shards)]
        show(console, f"Order of {options.scale:,} samples in {options.shards:,} shards", rows)
    elif options.soak:
        show(console, f"{options.soak:,} steps of the stream", soak_rows(options))
    else:
        bench_loading(console, options)


def parse(arguments: list[str] | None = None) -> Namespace:
    """The command line.

    Raises:
        RunError: an unknown flag, or a number out of range.
    """
    parser = Parser(prog="bench_data.py", description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int | None, default=None, help="only plan the order of so many samples")
    parser.add_argument("--shards", type=int, default=20_000, help="shards that hold them")
    parser.add_argument("--soak", type=int | None, default=None, help="only run the stream for so many steps")
    parser.add_argument("--photos", type=Path | None, default=None, help="folder of photographs (Debian's wallpapers)")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads of a loader")
    parser.add_argument("--batches", type=int, default=40, help="batches of 32 that each loader reads")
    options = parser.parse_args(arguments)
    check_min(options, dict.fromkeys(("scale", "shards", "soak", "workers", "batches"), 1), "--")
    if options.scale and options.scale < options.shards:
        raise RunError(f"--scale {options.scale} samples do not fill --shards {options.shards}; lower the latter")
    return options


def bench_loading(console: Console, options: Namespace) -> None:
    """Measure indexing, decoding in one thread, and complete loaders."""
    load_package("webdataset", "bench")  # this and the photographs before minutes of other measurements
    photos = [(size, decode.photographs(options.photos, *size)) for size in SIZES]
    with tempfile.TemporaryDirectory() as folder:
        show(console, "Index of a tar shard", index.metrics(Path(folder)))
    for (width, height), jpegs in photos:
        console.info(f"{len(jpegs)} photographs of {width}x{height}")
        show(console, f"One thread, {width}x{height} to 224", decode.one_thread(jpegs, SCALE, rounds=5))
        with tempfile.TemporaryDirectory() as folder:
            rows = decode.loaders(jpegs, Path(folder), SCALE, options.batches, options.workers)
            show(console, f"Loaders on {options.workers} processes or threads, {width}x{height} to 224", rows)


def soak_rows(options: Namespace) -> list[dict]:
    """Yields one row a reading; the last reports the growth since the first quarter."""
    share = BatchShard(global_batch=32, micro_batch=32, rank=0, world=1)
    pairs_ = pairs.open_train(DataConfig(workers=options.workers), 0, Shape(image_size=64, text_length=24))
    stream = TrainStream(pairs_, share, options.workers)
    rows = [
        {"step": step, "images/s": rate, "MiB": memory, "open files": files}
        for step, rate, memory, files in soak.metrics(stream, options.soak)
    ]
    warm, last = rows[len(rows) // 4], rows[-1]
    growth = {name: last[name] - warm[name] for name in ("MiB", "open files")}
    return [*rows, {"step": f"since {warm['step']}", "images/s": None, **growth}]


def show(console: Console, title: str, rows: list[dict]) -> None:
    """Show a table on the terminal."""
    table = Table(title=title, title_justify="left")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name, justify="left" if isinstance(rows[0].get(name), str) else "right")
    for row in rows:
        table.add_row(*(cell(row.get(name)) for name in names))
    console.show(table)


def cell(value: object) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else f"{value}"


if __name__ == "__main__":
    run_command(main)
