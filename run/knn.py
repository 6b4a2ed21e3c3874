#!/usr/bin/env python3
"""What is a frozen encoder worth? k nearest neighbours on its features.

    python run/knn.py runs/openmoji_tiny --data fashion-mnist
    python run/knn.py runs/NAME --data imagenet --k 10 20 100 200          # imagenet/train/CLASS, imagenet/val/CLASS
    python run/knn.py runs/NAME --data 'train/*.tar' --test 'test/*.tar' --label class
    python run/knn.py runs/NAME --data fashion-mnist --encoder random --seeds 3     # the floor

Class token and mean of the patch tokens, of the central square of each image, nothing masked; cosine similarity,
votes weighted by exp(similarity / 0.07) as DINO has them. Images of another size are resized (bicubic), small ones
up: Fashion-MNIST's 28 x 28 grey pixels are shown to the encoder at its own size, in three equal channels. What
--data may be: run/evaluation/datasets.py. Features are kept under the cache folder, by weights and images.
"""

import torch
from jsonargparse import Namespace

from mug.run.evaluation.command import Results, accuracy_of, build_parser, check, encoders, open_data
from mug.run.evaluation.knn import predict
from mug.run.training import hardware
from mug.run.training.console import Console, run_command
from mug.run.training.errors import RunError


def main(console: Console) -> None:
    options = parse()
    splits = open_data(options, console)
    most = max(options.k)
    if most > len(splits.train):
        raise RunError(f"--k {most} is more than the {len(splits.train)} training images")
    results, device = Results(len(splits.test)), hardware.device()
    train_labels, test_labels = (torch.from_numpy(x) for x in (splits.train_labels, splits.test_labels))
    for encoder in encoders(options, splits, console):
        for feature, train_ND in encoder.train.items():
            test_MD = encoder.test[feature].to(device)
            predicted = predict(train_ND.to(device), train_labels.to(device), test_MD, options.k)
            for k, predicted_M in predicted.items():
                results.add(feature, f"k = {k}", accuracy_of(predicted_M, test_labels))
    results.show(options, "kNN", encoder.name, console)


def parse(arguments: list[str] | None = None) -> Namespace:
    """The command line.

    Raises:
        RunError: an unknown flag, or a number out of range.
    """
    parser = build_parser("knn.py", __doc__.splitlines()[0], seeds=1)
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="neighbours that vote")
    options = parser.parse_args(arguments)
    check(options)
    if min(options.k) < 1:
        raise RunError(f"--k must be at least 1, not {min(options.k)}")
    options.k = sorted(set(options.k))
    return options


if __name__ == "__main__":
    run_command(main)
