"""Counts how often in a row a run has ended, without progress, because a rank was lost: in a file in its folder.

Status 75 asks for a restart. A rank that dies the same way each time, of a segmentation fault in a kernel or out of
memory, would make a scheduler restart it for ever.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "lost_ranks.json"
LIMIT = 3  # losses in a row without progress, after which the run no longer asks for a restart


@dataclass(frozen=True)
class Losses:
    """The ranks lost so far."""

    in_a_row: int = 0
    saved: int = -1  # the newest checkpoint's step at the start of the last one that was lost
    reached: int = -1  # the furthest step that it, or those in a row before it, had done

    def another(self, saved: int, reached: int) -> "Losses":
        """Returns the count after one more loss: it is the first if the run has saved or done a new step since."""
        further = saved > self.saved or reached > self.reached
        return Losses(1 if further else self.in_a_row + 1, max(saved, self.saved), max(reached, self.reached))


def read(output: Path) -> Losses:
    """Returns the count in the run's folder; nothing lost, if there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Losses(**json.loads((output / FILE).read_text(encoding="utf-8")))
    return Losses()


def write(output: Path, losses: Losses) -> None:
    """Save it for the next start, if the folder can be written."""
    with contextlib.suppress(OSError):
        output.mkdir(parents=True, exist_ok=True)
        fresh = output / f"{FILE}.{os.getpid()}"  # the first two ranks of a host may write at the same time
        fresh.write_text(json.dumps(asdict(losses)), encoding="utf-8")
        os.replace(fresh, output / FILE)
