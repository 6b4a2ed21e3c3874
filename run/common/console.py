"""The command's own lines on the terminal, from rank 0; everything that libraries print, in a log file per rank."""

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mug.run.common.errors import (
    DIVERGED,
    RESTART,
    Diverged,
    RankLocalError,
    ReportedByRankZero,
    RestartRequested,
    in_one_line,
    user_errors,
)
from mug.run.common.rank_env import find_place, speaking_rank, wait_for
from mug.run.common.source_digest import another_installation

SPEAKING_SECONDS = 10.0  # that silent ranks give to the one that reports for them
# A pipe whose reader has ended, a terminal that was closed.
BROKEN_PIPE = (errno.EPIPE, errno.EIO)


class Console:
    """Keeps the terminal to itself and sends file descriptors 1 and 2 elsewhere.

    They go to a file without a name until `log_to` gives them the run's log: a command that ends on a user's
    mistake leaves nothing behind.
    """

    def __init__(self, rank: int):
        self.rank = rank
        _fill_closed()
        self.terminal = _copy_of(1, sys.__stdout__)
        self.errors = _copy_of(2, sys.__stderr__)
        self.early = tempfile.TemporaryFile()  # noqa: SIM115
        self.log: Path | None = None
        self.bar: Progress | None = None
        self.unit = "step"
        self.asked = False  # to end
        self._redirect(self.early.fileno())
        sys.stdout, sys.stderr = (_for_libraries(*stream) for stream in ((1, sys.stdout), (2, sys.stderr)))
        lines = logging.getLogger("mug")  # messages of the layers below
        lines.setLevel(logging.INFO)
        lines.addHandler(_Lines(self))

    @staticmethod
    def _redirect(descriptor: int) -> None:
        _flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)

    def log_to(self, path: Path) -> None:
        """Append what was printed so far, and all that follows, to the file `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.log = path
        with path.open("ab") as file:
            self._redirect(file.fileno())
            self.early.seek(0)
            file.write(self.early.read())
        self.early.close()

    def show_early(self) -> None:
        """Show on the terminal what was printed before there was a log."""
        _flush()
        if self.log is None:
            self.early.seek(0)
            with self._perhaps_unread():
                self.terminal.write(self.early.read().decode(errors="replace"))
                self.terminal.flush()

    def info(self, line: str) -> None:
        """Print a line on the terminal, from rank 0 only; above the progress bar if there is one."""
        if self.rank == 0:
            with self._perhaps_unread():
                if self.bar:
                    self.bar.console.print(line, highlight=False, markup=False)
                else:
                    print(line, file=self.terminal)

    def show(self, table: Table, columns: int | None = None) -> None:
        """Print a table, from rank 0 only; `columns` wide where the output is not a terminal."""
        if self.rank == 0:
            width = None if self.terminal.isatty() else columns
            with self._perhaps_unread():
                _Paper(file=self.terminal, width=width).print(table)

    @contextlib.contextmanager
    def _perhaps_unread(self) -> Iterator[None]:
        """Guard printing: the launcher's connection, the pipe's other end or the terminal may be gone.

        A command that handles SIGTERM, a run, is asked to save and end. Others continue: their results go to files.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in BROKEN_PIPE:
                raise
            if not self.asked and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                self.asked = True
                os.kill(os.getpid(), signal.SIGTERM)

    def warn(self, line: str) -> None:
        self.info(f"warning: {line}")

    def error(self, line: str) -> None:
        with contextlib.suppress(OSError):
            print(line, file=self.errors)

    def start_bar(self, total: int, done: int, unit: str = "step") -> None:
        """A progress bar where the terminal can show one; plain lines (`step`) do elsewhere."""
        self.unit = unit
        if self.rank == 0 and self.terminal.isatty():
            columns = TextColumn(unit), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}")
            self.bar = Progress(*columns, TimeRemainingColumn(), console=RichConsole(file=self.terminal))
            self.bar.add_task("", total=total, completed=done)
            self.bar.start()

    def step(self, step: int, text: str | None) -> None:
        """Show that `step` is done; `text` holds its metrics, at the steps that are logged."""
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, **({"description": text} if text else {}))
        elif text:
            self.info(f"{self.unit} {step}  {text}")

    def close(self) -> None:
        if self.bar:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self.bar.stop()
            self.bar = None


def _fill_closed() -> None:
    """Open those of descriptors 0 to 2 that are closed, or the next file opened would take their place."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor


def _copy_of(descriptor: int, stream: TextIO | None) -> TextIO:
    """Returns a separate stream to the descriptor's target; characters that its encoding lacks are escaped.

    `stream` is Python's, None where the descriptor was closed.
    """
    encoding = stream.encoding if stream else "utf-8"
    return os.fdopen(os.dup(descriptor), "w", buffering=1, encoding=encoding, errors="backslashreplace")


def _for_libraries(descriptor: int, stream: TextIO | None) -> TextIO:
    """Returns Python's stream, set to escape characters that its encoding lacks; a new one where there was none."""
    if stream is None:
        stream = open(descriptor, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.flush()


class _Paper(RichConsole):
    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, where rich would end the process."""
        raise


class _Lines(logging.Handler):
    """Passes log records on to the console."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.info(record.getMessage())


def run_command(main: Callable[[Console], None]) -> None:
    """Run an entry point: user errors end with one line and status 2, others with a traceback and status 1.

    A run that was interrupted ends with one line and status 75, one that would fail again as it did with status 3.
    """
    console = Console(speaking_rank())
    started = time.time()
    try:
        if other := another_installation():
            console.warn(other)
        main(console)
    except SystemExit as leaving:
        console.close()
        if leaving.code:  # a verdict, reported already
            exit_now(leaving.code)
        console.show_early()  # --help
        raise
    except user_errors() as error:
        console.close()
        if console.log and isinstance(error, OSError):
            _into_log(traceback.format_exc())
        if console.rank == 0 or isinstance(error, RankLocalError):
            console.error(f"error: {in_one_line(error)}")
        elif isinstance(error, ReportedByRankZero):
            wait_for("rank", SPEAKING_SECONDS)
        elif console.log or _first_of_a_host() or not _fails_like_the_speaker():
            console.error(f"error: rank {console.rank}: {in_one_line(error)}")
        exit_now(2)
    except Diverged as reason:
        console.close()
        if console.rank == 0:
            console.error(f"error: {reason}")
        else:
            wait_for("rank", SPEAKING_SECONDS)
        exit_now(DIVERGED)
    except RestartRequested as reason:
        console.close()
        console.info(str(reason))
        if console.rank:
            wait_for("rank", SPEAKING_SECONDS)
        exit_now(RESTART)
    except KeyboardInterrupt:
        console.close()
        console.error("interrupted from the keyboard")
        exit_now(130)
    except Exception:
        console.close()
        trace = traceback.format_exc()
        console.show_early()
        _into_log(trace)
        where = f"; the libraries' output is in {console.log}" if console.log else ""
        console.error(f"{trace}rank {console.rank} stopped after {time.time() - started:.0f} s{where}")
        exit_now(1)
    console.close()


def _into_log(text: str) -> None:
    with contextlib.suppress(OSError):  # the log may be on a full disk, which is then the error to report
        print(text, file=sys.stderr)


def _first_of_a_host() -> bool:
    """Whether this rank reports for those of its host: before the rendezvous, they all fail alike."""
    met = "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized()
    return met and os.environ.get("LOCAL_RANK") == "0"


def _fails_like_the_speaker() -> bool:
    """Whether the first rank of this host has ended, too: before the rendezvous, all fail alike, and one reports."""
    if find_place(os.environ).local_rank == 0:  # it is this one, of a host that rank 0 is not on
        time.sleep(SPEAKING_SECONDS)  # for rank 0's launcher to end this one
        return False
    return wait_for("local_rank", 2 * SPEAKING_SECONDS)


def exit_now(status: int) -> NoReturn:
    """End the process with `status`, which an orderly shutdown cannot promise: it aborts now and then while threads
    of the process group are at work, and closing the group waits for ranks that may be gone."""
    with contextlib.suppress(OSError):  # the log may be on a full disk
        _flush()
    os._exit(status)
