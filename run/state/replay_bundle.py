"""Replay bundles: what is needed to rerun a step whose loss or gradient was not finite, as JSON in OUTPUT/replay."""

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mug.run.common.errors import RunError
from mug.run.common.output import write_whole

FORMAT = 1


@dataclass(frozen=True)
class MicroBatch:
    """What one rank passed through the model at once, and the losses it gave.

    All that is random about a sample is a function of the recipe's seed and its position.
    """

    rank: int
    positions: tuple[int, int, int]  # the arguments of a range
    losses: dict[str, float]  # by term

    def __str__(self) -> str:
        positions = range(*self.positions)
        by = f" by {positions.step}" if positions.step > 1 else ""
        return f"rank {self.rank}, positions {positions[0]} to {positions[-1]}{by}"


@dataclass(frozen=True)
class Bundle:
    """A step of a run that updated nothing."""

    step: int
    checkpoint: str | None  # of the state before the step; None if it was the first
    deepspeed: str  # path of the JSON, as the command had it
    world_size: int
    zero_stage: int
    recipe: dict[str, Any]
    micro_batches: list[MicroBatch]  # of all ranks
    versions: dict[str, str]


def write(output: Path, bundle: Bundle) -> Path:
    """Write OUTPUT/replay/step-STEP.json. Losses are strings there, for JSON has no NaN."""
    path = output / "replay" / f"step-{bundle.step}.json"
    path.parent.mkdir(exist_ok=True)
    fields = dataclasses.asdict(bundle)
    for micro_batch in fields["micro_batches"]:
        micro_batch["losses"] = {term: repr(loss) for term, loss in micro_batch["losses"].items()}
    write_whole(path, json.dumps({"format": FORMAT, **fields}, indent=1) + "\n")
    return path


def checkpoints_to_replay(output: Path) -> set[str]:
    """Returns the names of the checkpoints that the replay bundles of a run start from.

    Raises:
        OSError: a bundle cannot be read.
    """
    folder, names = output / "replay", set()
    for name in os.listdir(folder) if folder.exists() else []:
        if fnmatch(name, "step-*.json"):
            with contextlib.suppress(RunError):  # what is not a bundle cannot be replayed, either
                names.add(_parse(folder / name).checkpoint)
    return names - {None}


def read(path: Path) -> Bundle:
    """Returns the bundle in a file.

    Raises:
        RunError: it cannot be read, or is not a bundle.
    """
    try:
        return _parse(path)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); name a file of a run's folder replay/") from None


def _parse(path: Path) -> Bundle:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format") != FORMAT:
            raise RunError(f"{path} has a format other than {FORMAT}")
        fields["micro_batches"] = [
            MicroBatch(one["rank"], tuple(one["positions"]), {term: float(x) for term, x in one["losses"].items()})
            for one in fields["micro_batches"]
        ]
        return Bundle(**fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{path} is not a replay bundle; name a file of a run's folder replay/") from None
