"""A recipe's section `checkpoint`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run's state is saved.

    Args:
        every_steps: steps between two checkpoints; also at the end.
        every_minutes: also after so many minutes without one, at a step that is logged; 0 leaves it to the steps.
        keep: how many of the newest to keep; those that a replay bundle starts from stay, too.
        asynchronous: copy the state to host memory and write it from there while training continues.
    """

    every_steps: int = 1000
    every_minutes: float = 0
    keep: int = 3
    asynchronous: bool = False
