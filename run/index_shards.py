#!/usr/bin/env python3
"""Write the index of shards: where each sample's image, caption and json are, and its cheap metadata.

    python run/index_shards.py 'cc3m/{00000..00331}.tar' --out cc3m/index
    python run/index_shards.py s3://bucket/cc3m/*.tar more/*.parquet --out index --workers 32

Reads tar, Arrow and Parquet shards: paths, URLs, globs and brace ranges. What was indexed already is kept, so a
command that was interrupted is simply rerun. A shard that is damaged, cut short, or holds another number of
samples than img2dataset's _stats.json next to it is named, and ends the command with status 2 after all others are
indexed. Where few samples have a caption, a warning lists what the shards hold instead, for --caption.
"""

import os
import sys
import time
from pathlib import Path

from jsonargparse import Namespace
from rich.table import Table

from mug.data.caption_check import caption_warnings
from mug.data.config import DataConfig
from mug.data.index.build import Shard, build_index
from mug.data.index.index import FORMATS, Index
from mug.data.reader import Reader
from mug.data.store.expand import expand
from mug.run.common.command_line import Parser
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RunError

MAX_ERRORS_SHOWN = 20
SECONDS_PER_LINE = 10  # where there is no terminal


def main(console: Console) -> None:
    options = parse()
    urls, begin = expand(options.shards), time.monotonic()
    console.info(f"indexing {len(urls):,} shards into {options.out}")
    console.start_bar(len(urls), 0, "shard")
    shards = build_index(urls, Path(options.out), options.workers, _Progress(console, len(urls)), options.caption)
    console.close()
    show(console, shards, time.monotonic() - begin)
    failures = [shard.failure for shard in shards if shard.failure]
    for failure in failures[:MAX_ERRORS_SHOWN]:
        console.error(f"error: {failure}")
    if failures:
        console.error(f"error: {len(failures)} of {len(shards)} shards cannot be used, so the index is incomplete")
        sys.exit(2)
    reader = Reader.of(Index.open(options.out, urls), DataConfig(remote="ranged"))
    for choice in sorted({shard.choice for shard in shards} - {""}):
        console.info(f"captions are taken from {choice}; choose another by --caption")
    for line in caption_warnings(reader, DataConfig().languages()):
        console.warn(line)
    console.info(f"{options.out}: {len(urls):,} shards, fingerprint {reader.index.fingerprint[:16]}")


def parse(arguments: list[str] | None = None) -> Namespace:
    """Parse the command line.

    Raises:
        RunError: an unknown flag, or a number out of range.
    """
    parser = Parser(prog="index_shards.py", description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=str, nargs="+", help="paths, URLs, globs or brace ranges")
    parser.add_argument(
        "--out", type=str, required=True, help="folder for the index; an earlier one is brought up to date"
    )
    parser.add_argument(
        "--caption", type=str | None, default=None, help="column or extension of the captions, as data.caption"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that scan")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        raise RunError(f"--workers must be at least 1, not {options.workers}")
    return options


class _Progress:
    """Called per shard: moves the bar, or prints a line now and then where there is none."""

    def __init__(self, console: Console, total: int):
        self.console = console
        self.total = total
        self.samples = 0
        self.next_line = time.monotonic() + SECONDS_PER_LINE

    def __call__(self, done: int, shard: Shard) -> None:
        self.samples += shard.count
        due = time.monotonic() >= self.next_line or done == self.total
        if due:
            self.next_line = time.monotonic() + SECONDS_PER_LINE
        self.console.step(done, f"of {self.total:,}, {self.samples:,} samples" if due else None)


def show(console: Console, shards: list[Shard], seconds: float) -> None:
    """Returns a table with a row for each format of shards."""
    table = Table("format", *("shards", "kept", "samples", "no caption", "left out", "GB"), title="index")
    for column in table.columns[1:]:
        column.justify = "right"
    for format in FORMATS:
        mine = [shard for shard in shards if shard.format == format]
        if mine:
            counts = [len(mine), sum(shard.reused for shard in mine)]
            counts += [sum(getattr(shard, name) for shard in mine) for name in ("count", "no_caption")]
            counts.append(sum(shard.left_out.count for shard in mine))
            table.add_row(format, *(f"{n:,}" for n in counts), f"{sum(shard.size for shard in mine) / 1e9:,.2f}")
    console.show(table)
    new = sum(shard.count for shard in shards if not shard.reused)
    console.info(f"{new:,} samples indexed in {seconds:.1f} s, {new / max(seconds, 1e-9):,.0f} samples/s")


if __name__ == "__main__":
    run_command(main)
