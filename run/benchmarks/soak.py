"""Does the stream leak memory or files? Thousands of steps at full speed, without a model."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from mug.data.stream import TrainStream

READINGS = 20


def metrics(stream: TrainStream, steps: int) -> Iterator[tuple[int, float, float, int]]:
    """Yields steps done, images/s since the last reading, MiB and open files of this process and its workers."""
    begin, every = time.perf_counter(), max(1, steps // READINGS)
    for step, _ in enumerate(itertools.islice(stream, steps), start=1):
        stream.advance()
        stream.take_replacements()
        if step % every == 0:
            rate = every * stream.share.global_batch / (time.perf_counter() - begin)
            family = [psutil.Process(), *psutil.Process().children(recursive=True)]
            files = sum(process.num_fds() for process in family)
            yield step, rate, sum(_private_memory(process.pid) for process in family), files
            begin = time.perf_counter()


def _private_memory(pid: int) -> float:
    """Returns the MiB that would be free without this process: pages of files that are mapped do not count."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines[1:])}
    return kilobytes["Anonymous"] / 1024
