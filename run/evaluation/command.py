"""What the evaluations of frozen features share: their options, the features, and how results are shown."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from jsonargparse import Namespace

from mug.data.config import DataConfig
from mug.run.evaluation.datasets import Source, Splits, open_splits
from mug.run.evaluation.features import (
    VIEW,
    EncoderFeatures,
    Features,
    PixelFeatures,
    cached_features,
    extract,
    random_encoder,
)
from mug.run.evaluation.intervals import MOST_SEEDS, Accuracy
from mug.run.training import hardware
from mug.run.training.command_line import Parser
from mug.run.training.console import Console
from mug.run.training.errors import RunError
from mug.run.training.output import check_writable_file
from mug.run.training.restore import restore

ENCODERS = ("checkpoint", "random", "pixels")


def build_parser(prog: str, description: str, seeds: int) -> Parser:
    """The options that all evaluations of frozen features have; `seeds` is their default number."""
    parser = Parser(prog=prog, description=description)
    add = parser.add_argument
    add("checkpoint", type=str, help="folder of a run, or one of its checkpoint-STEP folders")
    add("--data", type=str, required=True, help="FOLDER, 'SHARDS', fashion-mnist[:FOLDER] or openmoji")
    add("--test", type=str | None, default=None, help="test images, where --data does not hold them")
    add("--label", type=str, default="label", help="key of the shards' json, or column of the dataset")
    add("--encoder", type=str, default="checkpoint", help="checkpoint; or a floor: random (untrained) or pixels")
    add("--seeds", type=int, default=seeds, help="runs with seeds 0, 1, …; mean and deviation are of these")
    add("--batch", type=int, default=256, help="images encoded at once")
    add("--workers", type=int, default=2, help="processes that decode images")
    add("--cache", type=str | None, default=None, help="folder for features and embedded data")
    add("--json", type=str | None, default=None, help="file to add the results to, a line of JSON each")
    return parser


def check(options: Namespace) -> None:
    """Raise RunError for a shared option that is out of range."""
    if options.encoder not in ENCODERS:
        raise RunError(f"--encoder {options.encoder} is not one of {', '.join(ENCODERS)}")
    if not 1 <= options.seeds <= MOST_SEEDS:
        raise RunError(f"--seeds must lie between 1 and {MOST_SEEDS}, not be {options.seeds}")
    for name, least in (("batch", 1), ("workers", 0)):
        if options[name] < least:
            raise RunError(f"--{name} must be at least {least}, not {options[name]}")
    if options.json:
        check_writable_file(Path(options.json), "--json")


@dataclasses.dataclass(frozen=True)
class Extracted:
    """The features of one encoder. `seeds` are those that it stands for: its own if it is random, else all."""

    name: str
    seeds: range
    train: Features
    test: Features


def open_data(options: Namespace, console: Console) -> Splits:
    splits = open_splits(options.data, options.test, options.label, options.cache)
    console.say(f"{len(splits.train):,} training, {len(splits.test):,} test images, {len(splits.names)} classes")
    return splits


def encoders(options: Namespace, splits: Splits, console: Console) -> Iterator[Extracted]:
    """The features of the encoder; of an untrained one for each seed in turn."""
    seeds = range(options.seeds)
    if options.encoder == "pixels":
        yield Extracted("pixels", seeds, *_both(PixelFeatures(), splits, options, console))
        return
    model, _, found = restore(Path(options.checkpoint), console.warn)
    size = model.config.image_size
    if options.encoder == "checkpoint":
        name = f"{found.folder.resolve().parent.name}, step {found.step}"
        yield Extracted(name, seeds, *_both(EncoderFeatures(model.encoder, size), splits, options, console))
        return
    for seed in seeds:
        network = EncoderFeatures(random_encoder(model.config, seed), size)
        yield Extracted("random", range(seed, seed + 1), *_both(network, splits, options, console))


def _both(network: torch.nn.Module, splits: Splits, options: Namespace, console: Console) -> tuple[Features, Features]:
    folder = DataConfig(cache=options.cache).cache_folder() / "features"
    key = network.key()

    def features(source: Source) -> Features:
        def make() -> Features:
            console.say(f"encoding {len(source):,} images")
            return extract(network, source, options.batch, options.workers, hardware.device())

        return cached_features(folder, f"{key} {source.fingerprint} {network.size} {VIEW}", make)

    return features(splits.train), features(splits.test)


class Results:
    """Accuracies by feature and setting, one for each seed; shown when all are in."""

    def __init__(self, images: int):
        self.images = images
        self.values: dict[tuple[str, str], list[float]] = {}

    def add(self, feature: str, setting: str, accuracy: float) -> None:
        self.values.setdefault((feature, setting), []).append(accuracy)

    def show(self, options: Namespace, method: str, encoder: str, console: Console) -> None:
        """A line each on the terminal, and in the file of --json."""
        for (feature, setting), values in self.values.items():
            accuracy = Accuracy(tuple(values), self.images)
            console.say(f"{method}  {feature:15}  {setting:7}  {accuracy}")
            if options.json:
                said = {"method": method, "encoder": encoder, "data": options.data, "feature": feature}
                with open(options.json, "a") as file:
                    file.write(json.dumps({**said, "setting": setting, **accuracy.row()}) + "\n")


def accuracy_of(predicted_M: torch.Tensor, labels_M: torch.Tensor) -> float:
    return (predicted_M.cpu() == labels_M).double().mean().item()
