"""Our own lines on the terminal, from rank 0; everything that libraries print, in a log file per rank."""

import contextlib
import errno
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mug.run.training.errors import (
    DIVERGED,
    RESTART,
    Diverged,
    Restart,
    SaidByRankZero,
    SaidByThisRank,
    user_errors,
)

# A full disk, a user's quota, a limit on the size of files.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A pipe whose reader has ended, a terminal that was closed.
NOBODY_THERE = (errno.EPIPE, errno.EIO)


class Console:
    """Keeps the terminal to itself and sends file descriptors 1 and 2 elsewhere.

    They go to a file without a name until `log_to` gives them the run's log: a command that ends on a user's
    mistake leaves nothing behind.
    """

    def __init__(self, rank: int):
        self.rank = rank
        self.terminal: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        self.errors: TextIO = os.fdopen(os.dup(2), "w", buffering=1)
        self.early = tempfile.TemporaryFile()  # noqa: SIM115
        self.log: Path | None = None
        self.bar: Progress | None = None
        self.unit = "step"
        self.unread = False
        self._redirect(self.early.fileno())
        lines = logging.getLogger("mug")  # what the layers below have to say
        lines.setLevel(logging.INFO)
        lines.addHandler(_Lines(self))

    @staticmethod
    def _redirect(descriptor: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)

    def log_to(self, path: Path) -> None:
        """Append what was said so far, and all that follows, to the file `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.log = path
        with path.open("ab") as file:
            self._redirect(file.fileno())
            self.early.seek(0)
            file.write(self.early.read())
        self.early.close()

    def show_early(self) -> None:
        """Put on the terminal what was printed before there was a log."""
        sys.stdout.flush()
        if self.log is None:
            self.early.seek(0)
            self.terminal.write(self.early.read().decode(errors="replace"))

    def say(self, line: str) -> None:
        """A line on the terminal, from rank 0 alone; above the progress bar if there is one."""
        if self.rank == 0:
            try:
                if self.bar:
                    self.bar.console.print(line, highlight=False, markup=False)
                else:
                    print(line, file=self.terminal)
            except OSError as error:
                if error.errno not in NOBODY_THERE:
                    raise
                self._ask_to_end()

    def _ask_to_end(self) -> None:
        """Nobody reads what is said: the launcher's connection is gone, the pipe's other end, or the terminal.

        A run saves first.
        """
        if not self.unread:
            self.unread = True
            os.kill(os.getpid(), signal.SIGTERM)

    def warn(self, line: str) -> None:
        self.say(f"warning: {line}")

    def fail(self, line: str) -> None:
        with contextlib.suppress(OSError):
            print(line, file=self.errors)

    def start_bar(self, total: int, done: int, unit: str = "step") -> None:
        """A progress bar where the terminal can show one; plain lines (`step`) do elsewhere."""
        self.unit = unit
        if self.rank == 0 and self.terminal.isatty():
            columns = (
                TextColumn(unit),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
            )
            console = RichConsole(file=self.terminal)
            self.bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self.bar.add_task("", total=total, completed=done)
            self.bar.start()

    def step(self, step: int, text: str | None) -> None:
        """Show that `step` is done; `text` holds its figures, at the steps that are logged."""
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, **({"description": text} if text else {}))
        elif text:
            self.say(f"{self.unit} {step}  {text}")

    def close(self) -> None:
        if self.bar:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self.bar.stop()
            self.bar = None


class _Lines(logging.Handler):
    """Passes log records on to the console."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.say(record.getMessage())


def run_command(main: Callable[[Console], None]) -> None:
    """Run an entry point: user errors end with one line and status 2, others with a traceback and status 1.

    A run that was interrupted ends with one line and status 75, one whose loss is not finite with status 3.
    """
    console = Console(rank=int(os.environ.get("RANK", 0)))
    started = time.time()
    try:
        main(console)
    except SystemExit as leaving:
        console.close()
        if leaving.code:  # a verdict, said already
            leave(leaving.code)
        console.show_early()  # --help
        raise
    except user_errors() as error:
        console.close()
        if console.rank == 0 or isinstance(error, SaidByThisRank):
            console.fail(f"error: {error}")
        elif not isinstance(error, SaidByRankZero) and (console.log or _first_of_a_host()):
            console.fail(f"error: rank {console.rank}: {error}")
        leave(2)
    except Diverged as reason:
        console.close()
        if console.rank == 0:
            console.fail(f"error: {reason}")
        leave(DIVERGED)
    except Restart as reason:
        console.close()
        console.say(str(reason))
        leave(RESTART)
    except KeyboardInterrupt:
        console.close()
        console.fail("stopped by the keyboard")
        leave(130)
    except Exception as error:
        console.close()
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            console.fail(f"error: {error}; make room, and start the same command again")
            leave(2)
        trace = traceback.format_exc()
        console.show_early()
        print(trace, file=sys.stderr)  # into the log
        where = f"; what the libraries said before is in {console.log}" if console.log else ""
        console.fail(f"{trace}rank {console.rank} stopped after {time.time() - started:.0f} s{where}")
        leave(1)
    console.close()


def _first_of_a_host() -> bool:
    """Whether this rank speaks for those of its host: before the ranks have met, they all fail alike."""
    met = "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized()
    return met and os.environ.get("LOCAL_RANK") == "0"


def leave(status: int) -> NoReturn:
    """End the process with `status`, which an orderly shutdown cannot promise: it aborts now and then while threads
    of the process group are at work, and closing the group waits for ranks that may be gone."""
    with contextlib.suppress(OSError):  # the log may be on a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
