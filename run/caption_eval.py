#!/usr/bin/env python3
"""Evaluate the captions of a checkpoint: beam search on held-out pairs; BLEU, CIDEr and METEOR.

    python run/caption_eval.py runs/compositions_tiny
    python run/caption_eval.py runs/NAME --shards 'coco_val/*.tar' --beams 4 --limit 5000

Short for `run/evaluate.py RUN --eval captions`. Without --shards, the run's own held-out pairs. Captions are written
from the full image; all captions of a pair in the run's languages are its true ones, and a pair without any is passed
over. CIDEr and METEOR need the package pycocoevalcap, METEOR also Java.
"""

from collections.abc import Sequence

from mug.run.common.console import Console, run_command
from mug.run.evaluate import Options, evaluate, parse_one


def main(console: Console) -> None:
    evaluate(console, parse())


def parse(arguments: Sequence[str] | None = None) -> Options:
    return parse_one("caption_eval.py", "captions", __doc__, arguments)


if __name__ == "__main__":
    run_command(main)
