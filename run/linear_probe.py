#!/usr/bin/env python3
"""Evaluate a frozen encoder by a linear classifier on its features.

    python run/linear_probe.py runs/compositions_tiny --data fashion-mnist
    python run/linear_probe.py runs/NAME --data imagenet --seeds 3        # imagenet/train/CLASS, imagenet/val/CLASS
    python run/linear_probe.py runs/NAME --data fashion-mnist --encoder pixels      # a baseline

Short for `run/evaluate.py RUN --eval linear_probe`. MAE's protocol (BatchNorm without affine, LARS, 90 epochs), with
two differences, which run/evaluators/linear_probe.py explains: features are computed once, without random crops, and a
small set is cut into smaller batches. The accuracy is that of the last epoch. Features, --data and small images: as in
run/knn.py.
"""

from collections.abc import Sequence

from mug.run.common.console import Console, run_command
from mug.run.evaluate import Options, evaluate, parse_one


def main(console: Console) -> None:
    evaluate(console, parse())


def parse(arguments: Sequence[str] | None = None) -> Options:
    return parse_one("linear_probe.py", "linear_probe", __doc__, arguments)


if __name__ == "__main__":
    run_command(main)
