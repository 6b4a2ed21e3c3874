#!/usr/bin/env python3
"""Train a tokenizer on the captions of shards.

python run/train_tokenizer.py 'cc3m/{00000..00331}.tar' --out cc3m_tokenizer.json --vocabulary 30522
python run/train_tokenizer.py 'emoji/*.tar' --out tokenizer.json --model unigram --language en,de,ja --vocabulary 16000
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from mug.data.builders.tokenizer_training import train_tokenizer
from mug.data.builders.unigram_training import train_unigram
from mug.data.builders.writers import replacing
from mug.data.caption_check import CaptionReader
from mug.data.config import DataConfig
from mug.data.languages import check_languages
from mug.data.reader import Reader
from mug.run.common.command_line import Parser, check_min
from mug.run.common.console import Console, run_command
from mug.run.common.output import check_new_file

REPORT_EVERY = 100_000  # pairs


def main(console: Console) -> None:
    options = parse()
    out = Path(options.out)
    check_new_file(out, "--out")
    data = DataConfig(language=options.language, caption=options.caption)
    read = read_captions(options.shards, options.samples, data, console)
    if options.model == "unigram":
        tokenizer = train_unigram(read, options.vocabulary, data.languages())
    else:
        tokenizer = train_tokenizer(read, options.vocabulary)
    with replacing(out) as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    console.info(f"{out}: {tokenizer.get_vocab_size()} tokens")


def parse(arguments: list[str] | None = None) -> Namespace:
    """Parse the command line.

    Raises:
        RunError: an unknown flag, no shards, or a number out of range.
    """
    parser = Parser(prog="train_tokenizer.py", description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=str, nargs="+", help="paths, globs or brace ranges, as for data.shards")
    parser.add_argument("--out", type=str, required=True, help="the tokenizer.json to write")
    parser.add_argument(
        "--model",
        type=Literal["wordpiece", "unigram"],
        default="wordpiece",
        help="wordpiece: lower case, without accents; unigram: text as it is, a token for each --language",
    )
    parser.add_argument("--vocabulary", type=int, default=30_522, help="max tokens")
    parser.add_argument("--samples", type=int, default=1_000_000, help="max pairs to read, spread over the shards")
    parser.add_argument("--language", type=str, default="en", help="of the captions, as for data.language: en,de")
    parser.add_argument(
        "--caption", type=str | None, default=None, help="column or extension of the captions, as data.caption"
    )
    options = parser.parse_args(arguments)
    check_min(options, {"vocabulary": 1, "samples": 1}, "--")
    return options


def read_captions(shards: list[str], samples: int, data: DataConfig, console: Console) -> Iterator[str]:
    """Yields all captions of at most `samples` pairs, spread evenly over the shards; then warns of those without."""
    reader = CaptionReader(
        Reader.open(shards if shards[1:] else shards[0], data, images_needed=False), data.languages()
    )
    check_languages(reader.reader, data.languages(), "--language")
    total = len(reader.reader.index)
    console.info(f"reading the captions of {min(samples, total):,} of {total:,} pairs")
    for shard, row in reader.reader.spread(samples):
        yield from reader.captions(shard, row)
        if reader.read % REPORT_EVERY == 0:
            console.info(f"{reader.read:,} pairs read")
    for line in reader.warnings():
        console.warn(line)


if __name__ == "__main__":
    run_command(main)
