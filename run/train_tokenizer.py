#!/usr/bin/env python3
"""Train a WordPiece tokenizer on the captions of shards.

python run/train_tokenizer.py 'cc3m/{00000..00331}.tar' --out cc3m_tokenizer.json --vocabulary 30522
"""

import os
from collections.abc import Iterator
from pathlib import Path

from jsonargparse import Namespace

from mug.data.captions import captions
from mug.data.config import DataConfig
from mug.data.errors import BadSample
from mug.data.reader import Reader
from mug.data.tokenizer_training import train_tokenizer
from mug.data.writers import replacing
from mug.run.training.command_line import Parser
from mug.run.training.console import Console, run_command
from mug.run.training.errors import RunError

REPORT_EVERY = 100_000  # pairs


def main(console: Console) -> None:
    options = parse()
    out = Path(options.out)
    if out.exists():
        raise RunError(f"--out {out} exists, and runs may use it: name another file, or remove it first")
    if not os.access(out.parent, os.W_OK):
        raise RunError(f"--out {out}: the folder {out.parent} is missing or cannot be written")
    languages = DataConfig(language=options.language).languages()
    read = read_captions(",".join(options.shards), options.samples, languages, console)
    tokenizer = train_tokenizer(read, options.vocabulary)
    with replacing(out) as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    console.say(f"{out}: {tokenizer.get_vocab_size()} tokens")


def parse(arguments: list[str] | None = None) -> Namespace:
    """The command line.

    Raises:
        RunError: an unknown flag, no shards, or a number out of range.
    """
    parser = Parser(prog="train_tokenizer.py", description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=str, nargs="+", help="paths, globs or brace ranges, as for data.shards")
    parser.add_argument("--out", type=str, required=True, help="the tokenizer.json to write")
    parser.add_argument("--vocabulary", type=int, default=30_522, help="most tokens")
    parser.add_argument("--samples", type=int, default=1_000_000, help="most pairs to read, spread over the shards")
    parser.add_argument("--language", type=str, default="en", help="of the captions, as for data.language: en,de")
    options = parser.parse_args(arguments)
    if options.samples < 1:
        raise RunError(f"--samples must be at least 1, not {options.samples}")
    return options


def read_captions(shards: str, samples: int, languages: tuple[str, ...], console: Console) -> Iterator[str]:
    """All captions in these languages of at most `samples` pairs, spread evenly over the shards."""
    reader = Reader.open(shards, DataConfig())
    samples = min(samples, len(reader.index))
    console.say(f"reading the captions of {samples:,} of {len(reader.index):,} pairs")
    for i, (shard, row) in enumerate(reader.spread(samples)):
        if i and i % REPORT_EVERY == 0:
            console.say(f"{i:,} pairs read")
        _, text, meta = reader.read(shard, row)
        try:
            yield from captions(text, meta, languages)
        except BadSample as error:
            console.warn(f"{reader.index.name(shard, row)}: {error}")


if __name__ == "__main__":
    run_command(main)
