"""What it takes to run a step again whose loss or gradient was not finite: a JSON file in OUTPUT/replay."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mug.run.training.errors import RunError

FORMAT = 1


@dataclass(frozen=True)
class MicroBatch:
    """What one rank put through the model at once, and the losses it gave.

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
    """A step of a run, of which nothing was updated."""

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
    path.write_text(json.dumps({"format": FORMAT, **fields}, indent=1) + "\n")
    return path


def checkpoints_to_replay(output: Path) -> set[str]:
    """The names of those that the bundles of a run start from."""
    names = set()
    for path in (output / "replay").glob("step-*.json"):
        with contextlib.suppress(RunError):  # what is no bundle cannot be run again, either
            names.add(read(path).checkpoint)
    return names - {None}


def read(path: Path) -> Bundle:
    """The bundle of a file.

    Raises:
        RunError: it cannot be read, or is none.
    """
    try:
        fields = json.loads(path.read_text())
        if fields.pop("format") != FORMAT:
            raise RunError(f"{path} has another format than {FORMAT}")
        fields["micro_batches"] = [
            MicroBatch(one["rank"], tuple(one["positions"]), {term: float(x) for term, x in one["losses"].items()})
            for one in fields["micro_batches"]
        ]
        return Bundle(**fields)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); name a file of a run's folder replay/") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{path} is no replay bundle; name a file of a run's folder replay/") from None
