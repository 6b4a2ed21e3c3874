"""A recipe's section `faults`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FaultsConfig:
    """What to do when ranks or losses go wrong.

    Args:
        hang_minutes: how long a rank may make no progress before the run stops and names it; an evaluation's batch, a
            picture and a save must each take less.
        nonfinite: 'stop' at a step whose loss or gradient is not finite, or 'skip' its batch; nothing is updated.
        spike_factor: a logged loss above so many times the median of the last 32 logged ones is a spike: roll back to
            an earlier checkpoint and skip the batches since then. 0 never does.
        spike_checkpoints: how many checkpoints to roll back.
        max_skips: how many times in a run to skip batches before it stops after all.
    """

    hang_minutes: float = 10.0
    nonfinite: Literal["stop", "skip"] = "stop"
    spike_factor: float = 0.0
    spike_checkpoints: int = 1
    max_skips: int = 10
