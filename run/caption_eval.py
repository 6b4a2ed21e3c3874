#!/usr/bin/env python3
"""How well does a checkpoint write captions? Beam search on held-out pairs; BLEU, CIDEr and METEOR.

    python run/caption_eval.py runs/openmoji_tiny
    python run/caption_eval.py runs/NAME --shards 'coco_val/*.tar' --beams 4 --limit 5000

Without --shards, the run's own held-out pairs. Captions are written from the whole image; all captions of a pair in
the run's languages are its true ones, and a pair without any is passed over. The figures go into the run's
results.jsonl and the captions into its captions.jsonl, where run/report.py finds them. CIDEr and METEOR need the
package pycocoevalcap, METEOR also Java.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jsonargparse import Namespace

from mug.data.config import DataConfig
from mug.data.tokenizer import Tokenizer
from mug.model.generate import beam_search
from mug.model.mug import MUG
from mug.run.evaluation.captions import score
from mug.run.evaluation.pairs import Pair, held_out_openmoji, read_pairs
from mug.run.evaluation.records import add_result
from mug.run.reporting.runs import CAPTIONS
from mug.run.training.checkpoint import Checkpoint
from mug.run.training.command_line import Parser
from mug.run.training.console import Console, run_command
from mug.run.training.errors import RunError
from mug.run.training.output import check_writable
from mug.run.training.packages import load_package
from mug.run.training.restore import restore

EXTRA = "eval"


def main(console: Console) -> None:
    options = parse()
    load_package("sacrebleu", EXTRA)
    console.say(f"reading {options.checkpoint}")
    model, tokenizer, found = restore(Path(options.checkpoint), console.warn)
    if model.config.captioning != "autoregressive":
        raise RunError(f"{found.folder} fills in masked words (model.captioning) and cannot write captions")
    if "caption" not in model.terms:
        raise RunError(f"{found.folder} never learned to write captions: its loss_weights.caption is 0")
    check_writable(found.folder.resolve().parent, "the run's folder")
    config, shards = held_out(options, found)
    pairs = read_pairs(shards, config, model.config.image_size, options.limit)
    rows = []
    console.start_bar(options.limit, 0, "image")
    for batch in batches((pair for pair in pairs if pair.captions), options.batch):
        written = write(model, tokenizer, batch, options.beams)
        rows += [{"key": p.key, "written": w, "true": p.captions} for p, w in zip(batch, written, strict=True)]
        console.step(len(rows), "captions written")
    if not rows:
        raise RunError(f"none of the pairs of {shards} has a caption in {config.language}; name other --shards")
    report(rows, options, found, console)


def parse(arguments: list[str] | None = None) -> Namespace:
    """The command line.

    Raises:
        RunError: an unknown flag, or a number out of range.
    """
    parser = Parser(prog="caption_eval.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=str, help="folder of a run, or one of its checkpoint-STEP folders")
    parser.add_argument("--shards", type=str | None, default=None, help="pairs (the run's held-out ones)")
    parser.add_argument("--beams", type=int, default=4, help="beams; 1 is greedy")
    parser.add_argument("--limit", type=int, default=5000, help="most pairs, spread over the shards")
    parser.add_argument("--batch", type=int, default=64, help="images at once")
    parser.add_argument("--cache", type=str | None, default=None, help="folder of what is built once")
    options = parser.parse_args(arguments)
    for name in ("beams", "limit", "batch"):
        if options[name] < 1:
            raise RunError(f"--{name} must be at least 1, not {options[name]}")
    return options


def held_out(options: Namespace, found: Checkpoint) -> tuple[DataConfig, str]:
    """How the pairs are read, and from which shards.

    Raises:
        RunError: the run has no held-out pairs, and no others are named.
    """
    trained = found.manifest["recipe"]["data"]
    config = DataConfig(cache=options.cache, language=trained["language"])
    if options.shards or trained["held_out"]:
        return config, options.shards or trained["held_out"]
    if trained["shards"]:
        raise RunError(f"{found.folder} was trained without data.held_out; name pairs with --shards")
    return config, held_out_openmoji(config)


def batches(pairs: Iterator[Pair], size: int) -> Iterator[list[Pair]]:
    while batch := list(itertools.islice(pairs, size)):
        yield batch


@torch.inference_mode()
def write(model: MUG, tokenizer: Tokenizer, batch: list[Pair], beams: int) -> list[str]:
    """A caption for each image, by beam search."""
    image_BCHW = torch.from_numpy(np.stack([pair.image for pair in batch])).to(next(model.parameters()).device)
    tokens_BT = beam_search(model, model.encoder(image_BCHW), beams)
    return [tokenizer.decode(row) for row in tokens_BT[:, 1:].tolist()]


def report(rows: list[dict], options: Namespace, found: Checkpoint, console: Console) -> None:
    """Say the figures, and leave them and the captions in the run's folder: these first, for METEOR may fail."""
    run = found.folder.resolve().parent
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (run / CAPTIONS).write_text("".join(lines), encoding="utf-8")
    figures = score([row["written"] for row in rows], [row["true"] for row in rows], console.warn)
    names = {
        "method": f"captions, {options.beams} beams",
        "encoder": f"{run.name}, step {found.step}",
        "data": options.shards or "held-out pairs",
    }
    add_result(run, {**names, "images": len(rows), **figures})
    for name, value in figures.items():
        console.say(f"{name:26} {value:8.3f}")
    console.say(f"{run / CAPTIONS}: {len(rows):,} captions")


if __name__ == "__main__":
    run_command(main)
