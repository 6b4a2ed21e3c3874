"""The ways in which a command ends before its time, each in one line.

Status 2 is a mistake that the user can mend, 3 a loss or gradient that is not finite; 75 says that the same command
will go on.
"""

DIVERGED = 3
RESTART = 75  # EX_TEMPFAIL of sysexits.h: what a scheduler may start again as it was


class RunError(Exception):
    """A mistake that the user can mend: one line that names the thing and the mend."""


class SaidByRankZero(RunError):
    """A RunError that all ranks raise, and rank 0 prints."""


class SaidByThisRank(RunError):
    """A RunError of one rank alone, which it prints itself."""


class Restart(Exception):
    """The run is saved and ends here, on all ranks; the same command goes on. One line, exit status 75."""


class Diverged(Exception):
    """Training cannot go on as it is, on all ranks; the same command would come to the same end. Status 3."""


def is_of_communication(error: BaseException) -> bool:
    """Whether it says that another rank could not be reached; gloo has no exception of its own for that."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def user_errors() -> tuple[type[Exception], ...]:
    """The exceptions of every layer that end a command with one line and exit status 2."""
    from mug.data.errors import DataError
    from mug.model.presets import ModelConfigError
    from mug.run.training.deepspeed_config import DeepSpeedConfigError

    return RunError, DataError, ModelConfigError, DeepSpeedConfigError
