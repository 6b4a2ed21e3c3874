"""The errors that end a command early, each with a one-line message.

Status 2 is a mistake that the user can fix, 3 a failure that would repeat: a loss or gradient that is not finite, a
rank that is lost again and again. 75 means that the same command will resume.
"""

import errno
import os

# A full disk, a user's quota, a limit on the size of files.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDIES = {
    **dict.fromkeys(DISK_FULL, "free disk space, and rerun the same command"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give this user permission, or choose another path"),
    errno.EROFS: "choose a path that is writable",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit on open files (`ulimit -n`)"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check its disk or server, and rerun the same command"),
}

DIVERGED = 3
NO_PROGRESS = 3  # likewise: rerun unchanged, it would fail the same way
RESTART = 75  # EX_TEMPFAIL of sysexits.h: a scheduler may rerun the same command


class RunError(Exception):
    """A mistake that the user can fix: one line that names the thing and the fix."""


class DeepSpeedConfigError(Exception):
    """An error in a DeepSpeed JSON: one line with the file, the key as a dotted path, what is wrong and the fix."""


class ReportedByRankZero(RunError):
    """A RunError that all ranks raise, and rank 0 prints."""


class RankLocalError(RunError):
    """A RunError of one rank only, which prints it itself."""


class RestartRequested(Exception):
    """The run is saved and ends here, on all ranks; the same command resumes it. One line, exit status 75."""


class Diverged(Exception):
    """Training cannot continue, on all ranks; the same command would fail the same way. Status 3."""


def is_communication_error(error: BaseException) -> bool:
    """Whether an error means that another rank could not be reached; gloo has no exception type for that."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def user_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions of every layer that end a command with one line and exit status 2."""
    from mug.data.errors import DataError
    from mug.kernels.errors import BackendError
    from mug.model.objectives.objective import ObjectiveError
    from mug.model.presets import ModelConfigError

    return RunError, DataError, ModelConfigError, ObjectiveError, BackendError, DeepSpeedConfigError, OSError


def in_one_line(error: BaseException) -> str:
    """Returns the error in one line: for an OSError the file, what is wrong with it, and what to do."""
    if not isinstance(error, OSError) or error.strerror is None:
        return " ".join(str(error).split("\n")) or repr(error)
    files = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    remedy = REMEDIES.get(error.errno)
    return ": ".join([*files, error.strerror]) + (f"; {remedy}" if remedy else "")
