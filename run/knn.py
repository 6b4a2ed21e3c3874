#!/usr/bin/env python3
"""Evaluate a frozen encoder by k nearest neighbours on its features.

    python run/knn.py runs/compositions_tiny --data fashion-mnist
    python run/knn.py runs/NAME --data imagenet --k '[10, 20, 100, 200]'   # imagenet/train/CLASS, imagenet/val/CLASS
    python run/knn.py runs/NAME --data 'train/*.tar' --test 'test/*.tar' --label class
    python run/knn.py runs/NAME --data fashion-mnist --encoder random --seeds 3     # a baseline

Short for `run/evaluate.py RUN --eval knn`. Class token and mean of the patch tokens, of the central square of each
image, nothing masked; cosine similarity, votes weighted by exp(similarity / 0.07) as DINO has them. Images of another
size are resized (bicubic), small ones up: Fashion-MNIST's 28 x 28 grey pixels are shown to the encoder at its own size,
in three equal channels. What --data may be: data/labelled_sources.py.
"""

from collections.abc import Sequence

from mug.run.common.console import Console, run_command
from mug.run.evaluate import Options, evaluate, parse_one


def main(console: Console) -> None:
    evaluate(console, parse())


def parse(arguments: Sequence[str] | None = None) -> Options:
    return parse_one("knn.py", "knn", __doc__, arguments)


if __name__ == "__main__":
    run_command(main)
