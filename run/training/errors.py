"""What a user did wrong, said in one line with exit status 2."""


class RunError(Exception):
    """A mistake that the user can mend: one line that names the thing and the mend."""


class SaidByRankZero(RunError):
    """A RunError that all ranks raise, and rank 0 prints."""


class SaidByThisRank(RunError):
    """A RunError of one rank alone, which it prints itself."""


def user_errors() -> tuple[type[Exception], ...]:
    """The exceptions of every layer that end a command with one line and exit status 2."""
    from mug.data.errors import DataError
    from mug.model.presets import ModelConfigError
    from mug.run.training.deepspeed_config import DeepSpeedConfigError

    return RunError, DataError, ModelConfigError, DeepSpeedConfigError
