"""The processes that read data for a training process: how they start, what they print, and why one has ended."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue

from torch.utils.data import DataLoader

from mug.data.errors import DataError
from mug.data.parent import end_with_parent

ENDING = {signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}  # what asks an entire job to end
SHARED_MEMORY = "/dev/shm"
NO_FORK_SERVER = 255  # the exit code that multiprocessing gives a process whose fork server is gone
# The messages of torch's DataLoader where a worker has ended, or cannot pass on what it has read.
LOST = re.compile(r"^DataLoader worker \(pid|^Too many open files|^received \d+ items of ancdata")

_printed: deque[str] = deque(maxlen=50)  # the last lines of the fork server and its workers


def worker_settings(workers: int) -> dict:
    """Returns what a DataLoader needs to run `workers` processes for a training process.

    That one runs CUDA, NCCL and OpenMP threads, and a plain fork may copy their locks as held: hence the fork
    server. Workers import the script that was started, so it must begin its work under `if __name__ == "__main__"`.
    """
    if not workers:
        return {"num_workers": 0}
    start_fork_server()
    return {
        "num_workers": workers,
        "multiprocessing_context": multiprocessing.get_context("forkserver"),
        "worker_init_fn": _begin,
    }


def start_fork_server() -> None:
    """Start the fork server, if it does not run; it takes seconds to be ready, and this does not wait for it.

    It imports once what each worker would, this project's modules that the training process has imported by now, from
    where that one has them. It ignores the signals that ask an entire job to end, and so will the workers: the
    training process handles them when its step is done, and needs its workers till then.
    """
    forkserver.set_forkserver_preload([name for name in sys.modules if name.startswith("mug.")])
    with _path_of_this_process():
        resource_tracker.ensure_running()  # the fork server wants it, and starting it unblocks signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            with _heard():
                forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _path_of_this_process() -> Iterator[None]:
    """Make Python processes that start here import what this one does.

    By itself, the fork server (before Python 3.13) imports from the current folder first.
    """
    wanted = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# --- What they print --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Let processes that start here print into a pipe.

    They outlive the file that this process prints into at first; their output follows it to the next one,
    and the last lines are kept for the reason why one has ended.
    """
    read, write = os.pipe()
    threading.Thread(target=_pass_on, args=(read,), daemon=True).start()
    before = [os.dup(descriptor) for descriptor in (1, 2)]
    for descriptor in (1, 2):
        os.dup2(write, descriptor)
    try:
        yield
    finally:
        for descriptor, saved in zip((1, 2), before, strict=True):
            os.dup2(saved, descriptor)
            os.close(saved)
        os.close(write)


def _pass_on(descriptor: int) -> None:
    with open(descriptor, encoding="utf-8", errors="backslashreplace") as lines:
        for line in lines:
            _printed.append(line.strip())
            with contextlib.suppress(OSError):
                os.write(2, line.encode("utf-8"))


# --- Why one has ended ------------------------------------------------------------------------------------


def batches_of(loader: DataLoader) -> Iterator:
    """Yields what the loader gives; a worker that ends is a DataError with the reason.

    Raises:
        DataError: the workers cannot be started, one has ended, or what they read cannot be passed on.
    """
    if not loader.num_workers:
        yield from loader
        return
    try:
        running = iter(loader)
    except (OSError, EOFError) as error:
        why = _last_words() or error
        raise DataError(f"the processes that read data cannot be started ({why}){_room()}") from error
    processes: list[BaseProcess] = vars(running)["_workers"]
    while True:
        try:
            loaded = next(running)
        except StopIteration:
            return
        except (RuntimeError, EOFError, ConnectionError) as error:
            if isinstance(error, RuntimeError) and not LOST.match(str(error)):
                raise
            raise DataError(_reason(processes, error)) from error
        yield loaded


def _reason(processes: list[BaseProcess], error: Exception) -> str:
    """Returns why data no longer arrives, in one line."""
    connection.wait([process.sentinel for process in processes], timeout=2)  # its connection may close before it ends
    ended = next((process for process in processes if process.exitcode is not None), None)
    if ended is None:
        return f"the processes that read data cannot pass it on ({error}); raise `ulimit -n`, or use fewer workers"
    who, code = f"process {ended.pid}, which read data,", int(ended.exitcode or 0)
    if code == NO_FORK_SERVER:
        return f"{who} has ended with the process that started it; was that killed, for example out of memory?"
    if code == -signal.SIGBUS:
        return f"{who} found no space for a batch in {SHARED_MEMORY}{_room()}"
    if code == -signal.SIGKILL:
        return f"{who} was killed, for example out of memory: use fewer workers, or give the job more memory"
    if code < 0:
        return f"{who} was ended by a signal: {signal.strsignal(-code)}"
    words = _last_words()
    return f"{who} has ended with status {code} ({words or 'no output'}){_room() if 'torch_' in words else ''}"


def _last_words() -> str:
    """Returns the last line of the processes that have ended: an exception's, if there was one."""
    time.sleep(0.2)  # the thread that listens may be behind
    return next((line for line in reversed(_printed) if line), "")


def _room() -> str:
    """Returns the free shared memory by which workers pass on what they read, and how to get more."""
    total, _, free = shutil.disk_usage(SHARED_MEMORY)
    return (
        f"; {SHARED_MEMORY} holds {total / 1e6:.0f} MB, of which {free / 1e6:.0f} are free: give it more"
        " (docker run --shm-size 8g; in Kubernetes an emptyDir of medium Memory there), or use fewer workers"
    )


# --- In a worker ------------------------------------------------------------------------------------------


def _begin(worker: int) -> None:
    """End with the training process, and when a batch cannot be handed to it: it would wait for that batch for ever.

    torch watches the parent's id, which is the fork server's.
    """
    Queue._on_queue_feeder_error = staticmethod(_end)
    end_with_parent()


def _end(error: Exception, batch: object) -> None:
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)
