#!/usr/bin/env python3
"""Write shards of image-text pairs from a folder, from Parquet, or from Debian's clip art or pictures of clothes.

python run/build_shards.py folder photos --out shards          # a.jpg with a.txt or a.json; subfolders are labels
python run/build_shards.py parquet pairs.parquet --out shards --format arrow
python run/build_shards.py openclipart --out shards            # apt install openclipart-png openclipart-svg
python run/build_shards.py fashion-mnist --out shards          # apt install dataset-fashion-mnist

Writes train-00000.tar and so on, held_out-00000.tar and so on, and NNNNN_stats.json beside each.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from mug.data import fashion_mnist
from mug.data.openclipart import INSTALLED, find_openclipart, openclipart_pairs
from mug.data.raw_pairs import LeftOut, folder_pairs, parquet_pairs, prepared
from mug.data.writers import Sample, is_held_out, write_shards
from mug.run.training.command_line import Parser
from mug.run.training.console import Console, run_command
from mug.run.training.errors import RunError

Pairs = Callable[[Callable[[str], bool]], Iterator[Sample]]  # whether a key or group is wanted → its pairs


def main(console: Console) -> None:
    options = parse()
    pairs = open_source(options)
    out = make_folder(Path(options.out))
    tally, left_out = Tally(), LeftOut()
    for split in ("train", "held_out") if options.held_out else ("train",):
        wanted = functools.partial(DIVIDES.get(options.kind, belongs), split=split, share=options.held_out)
        some = itertools.islice(prepared(pairs(wanted), options.image_size, left_out), options.most)
        samples = tally.counting(some)
        for path, count in write_shards(samples, out, f"{split}-", options.format, options.samples_per_shard):
            console.say(f"{path}  {count} pairs")
    if not tally.pairs:
        raise RunError(f"{options.source or options.kind}: no images to write{left_out_line(left_out)}")
    console.say(f"{tally.pairs} pairs, {tally.captioned} with a caption{left_out_line(left_out)}")


def parse(arguments: list[str] | None = None) -> Namespace:
    """The command line.

    Raises:
        RunError: an unknown flag, a missing source, or a number out of range.
    """
    parser = Parser(prog="build_shards.py", description=__doc__.splitlines()[0])
    parser.add_argument("kind", type=Literal["folder", "parquet", "openclipart", "fashion-mnist"], help="what to read")
    parser.add_argument(
        "source", type=str, nargs="?", help="folder or Parquet file (those of Debian: where it puts them)"
    )
    parser.add_argument("--out", type=str, required=True, help="folder for the shards, new or empty")
    parser.add_argument("--format", type=Literal["tar", "arrow", "parquet"], default="tar", help="of the shards")
    parser.add_argument("--samples_per_shard", type=int, default=10_000, help="most pairs in a shard")
    parser.add_argument("--held_out", type=float, default=0.1, help="share of pairs to hold out, by key; 0 for none")
    parser.add_argument("--most", type=int | None, default=None, help="most pairs in each split; all if left out")
    parser.add_argument(
        "--image_size", type=int | None, default=None, help="shrink images whose longer side is greater, as JPEG"
    )
    options = parser.parse_args(arguments)
    if options.source is None and options.kind in ("folder", "parquet"):
        raise RunError(f"{options.kind} needs a source: name a folder or file after it")
    for name in ("samples_per_shard", "image_size", "most"):
        if options[name] is not None and options[name] < 1:
            raise RunError(f"--{name} must be at least 1, not {options[name]}")
    if not 0 <= options.held_out < 1:
        raise RunError(f"--held_out must be 0 or more and less than 1, not {options.held_out}")
    return options


def open_source(options: Namespace) -> Pairs:
    """Where the pairs come from."""
    if options.kind == "fashion-mnist":
        return functools.partial(fashion_mnist.fashion_mnist_pairs, Path(options.source or fashion_mnist.INSTALLED))
    if options.kind == "openclipart":
        return functools.partial(openclipart_pairs, find_openclipart(Path(options.source or INSTALLED)))
    read = {"folder": folder_pairs, "parquet": parquet_pairs}[options.kind]
    return functools.partial(read, Path(options.source))


def make_folder(out: Path) -> Path:
    """The folder `out`, new or empty: shards of an earlier build would mix with those of this one."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise RunError(f"--out {out} is a file or not empty: name a new folder, or remove it first")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {out} cannot be made: {error.strerror}") from error
    return out


def belongs(name: str, split: str, share: float) -> bool:
    """Whether the pair of this key or group goes into this split."""
    return is_held_out(name, share) == (split == "held_out")


def belongs_officially(key: str, split: str, share: float) -> bool:
    """Whether the picture of this key is of this split, where the data set has made them; the share is its own."""
    return key.startswith("t10k/") == (split == "held_out")


DIVIDES = {"fashion-mnist": belongs_officially}


@dataclass
class Tally:
    """How many pairs were written, and how many of them with a caption."""

    pairs: int = 0
    captioned: int = 0

    def counting(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            self.pairs += 1
            self.captioned += bool(sample.caption)
            yield sample


def left_out_line(left_out: LeftOut) -> str:
    return f"; {left_out.count} left out, the first {left_out.first}" if left_out.count else ""


if __name__ == "__main__":
    run_command(main)
