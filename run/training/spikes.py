"""Loss spikes: how one is recognised, and how a run is rolled back (PaLM, arXiv 2204.02311, section 5.1)."""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from mug.run.state import checkpoint
from mug.run.state.checkpoint import Checkpoint

WINDOW = 32  # logged losses that a new one is compared with
MIN_LOSSES = 8  # logged losses that the median needs


class SpikeAlarm:
    """Compares each logged loss with the median of those before it."""

    def __init__(self, factor: float, losses: Iterable[float]):
        """`factor` 0 never sounds; `losses` are those logged before the run was started again."""
        self.factor = factor
        self.losses = deque(losses, WINDOW)

    def check(self, loss: float) -> bool:
        """Whether `loss` is a spike; if not, it is remembered."""
        if not math.isfinite(loss):
            return False
        spike = (
            bool(self.factor) and len(self.losses) >= MIN_LOSSES and loss > self.factor * statistics.median(self.losses)
        )
        if not spike:
            self.losses.append(loss)
        return spike


def rollback(output: Path, checkpoints: int, step: int, next_position: int, keep: int) -> Checkpoint | None:
    """Commit a checkpoint of `step` with the state of an earlier one, and the positions between as skipped.

    The run that is started from it continues at `next_position`. Returns the earlier one, the newest but
    `checkpoints` - 1, or the oldest there is; None if there is none yet.

    Raises:
        RunError: that one is damaged.
    """
    folders = checkpoint.list_folders(output)[:keep]  # those for replay may be as old as the run
    if not folders:
        return None
    found = checkpoint.verify(folders[min(checkpoints, len(folders)) - 1])
    data = found.manifest["data"]
    skipped = [*data["skipped"], [data["next_position"], next_position]]
    state = {**found.manifest, "data": {**data, "next_position": next_position, "skipped": skipped}}
    checkpoint.fork(output, found, step, state, keep)
    return found
