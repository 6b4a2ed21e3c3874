#!/usr/bin/env python3
"""What is a frozen encoder worth? A linear classifier on its features.

    python run/linear_probe.py runs/openmoji_tiny --data fashion-mnist
    python run/linear_probe.py runs/NAME --data imagenet --seeds 3        # imagenet/train/CLASS, imagenet/val/CLASS
    python run/linear_probe.py runs/NAME --data fashion-mnist --encoder pixels      # a floor

MAE's protocol (BatchNorm without affine, LARS, 90 epochs), with two differences that are said in
run/evaluation/linear.py: features are computed once, without random crops, and a small set is cut into smaller
batches. The accuracy is that of the last epoch. Features, --data and small images: as in run/knn.py.
"""

import torch
from jsonargparse import Namespace

from mug.run.evaluation.command import Results, accuracy_of, build_parser, check, encoders, open_data
from mug.run.evaluation.linear import ProbeConfig, train_probe
from mug.run.training import hardware
from mug.run.training.console import Console, run_command
from mug.run.training.errors import RunError


def main(console: Console) -> None:
    options = parse()
    config = ProbeConfig(epochs=options.epochs, batch=options.probe_batch, learning_rate=options.learning_rate)
    splits = open_data(options, console)
    batch = config.batch_for(len(splits.train))
    console.say(f"probe: {config.epochs} epochs, batch {batch}, learning rate {config.learning_rate}")
    results, device = Results(len(splits.test)), hardware.device()
    train_labels, test_labels = (torch.from_numpy(x) for x in (splits.train_labels, splits.test_labels))
    for encoder in encoders(options, splits, console):
        for feature, train_ND in encoder.train.items():
            train_ND, test_MD = train_ND.to(device), encoder.test[feature].to(device)
            for seed in encoder.seeds:
                probe = train_probe(train_ND, train_labels.to(device), len(splits.names), config, seed)
                with torch.inference_mode():
                    results.add(feature, "", accuracy_of(probe(test_MD).argmax(1), test_labels))
    results.show(options, "linear probe", encoder.name, console)


def parse(arguments: list[str] | None = None) -> Namespace:
    """The command line.

    Raises:
        RunError: an unknown flag, or a number out of range.
    """
    defaults = ProbeConfig()
    parser = build_parser("linear_probe.py", __doc__.splitlines()[0], seeds=3)
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="passes over the training images")
    parser.add_argument("--probe_batch", type=int | None, default=None, help="batch (16384, or N / 78 if less)")
    parser.add_argument("--learning_rate", type=float, default=defaults.learning_rate, help="LARS's peak")
    options = parser.parse_args(arguments)
    check(options)
    for name, least in (("epochs", 1), ("probe_batch", 2)):
        if options[name] is not None and options[name] < least:
            raise RunError(f"--{name} must be at least {least}, not {options[name]}")
    if not options.learning_rate > 0:
        raise RunError(f"--learning_rate must be more than 0, not {options.learning_rate}")
    return options


if __name__ == "__main__":
    run_command(main)
