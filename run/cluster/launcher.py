"""The processes that started this rank and answer for it.

Once one of them is gone, nothing ends the rank or restarts it, and it must end by itself.

The kernel's PR_SET_PDEATHSIG would do it without asking, but it fires when the thread that started a process ends, and
not at all if that was before the process asked for it. Whether the ancestors are still the same can be asked
at any time, and everywhere.
"""

import contextlib
import os
from collections.abc import Iterator

import psutil

# torchrun, and what is built on it, sets the one; DeepSpeed's launcher, of which each host has one, the other. What
# a shell, srun or mpirun has started has neither: there a parent that ends (nohup, setsid, a script) means nothing.
TORCHRUN, DEEPSPEED = "TORCHELASTIC_RUN_ID", "CROSS_RANK"


class Launcher:
    """This rank's launcher, as it is now; without one, no process counts."""

    def __init__(self):
        self.ancestor_pids: list[int] = []  # process ids: this rank's parent, its parent and so on
        if TORCHRUN in os.environ or DEEPSPEED in os.environ:
            ancestors = list(_ancestors())
            # A launcher is a Python program. Between it and the rank there may be a user's script.
            if pythons := [place for place, process in enumerate(ancestors) if _is_python(process)]:
                # DeepSpeed's on a host belongs to a `deepspeed`, or to the ssh connection that one has opened.
                last = pythons[0] + (1 if DEEPSPEED in os.environ else 0)
                self.ancestor_pids = [process.pid for process in ancestors[: last + 1]]

    def is_gone(self) -> bool:
        """Whether one of its processes has ended: the kernel has then given its children to another parent."""
        try:
            parents = [psutil.Process(child).ppid() for child in (os.getpid(), *self.ancestor_pids[:-1])]
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:  # /proc shows only a user's own processes
            return False
        return bool(self.ancestor_pids) and parents != self.ancestor_pids


def _ancestors() -> Iterator[psutil.Process]:
    """Returns the ancestors from the parent up, as far as they still exist."""
    process: psutil.Process | None = psutil.Process()
    with contextlib.suppress(psutil.Error):
        while process := process.parent():
            yield process


def _is_python(process: psutil.Process) -> bool:
    try:
        return "python" in os.path.basename(process.exe())
    except psutil.Error:  # another user's
        return False


LAUNCHER = Launcher()  # now: it may be gone by the time that the data are open and the ranks have connected
