"""Does the stream leak memory or files? Thousands of steps at full speed, without a model."""

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

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
            family = [os.getpid(), *_descendants(os.getpid())]
            yield step, rate, sum(map(_private_memory, family)), sum(map(_open_files, family))
            begin = time.perf_counter()


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text(encoding="utf-8").split()):
            found += [child, *_descendants(child)]
    return found


def _private_memory(pid: int) -> float:
    """Returns the MiB that would be free without this process: pages of files that are mapped do not count."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines[1:])}
    return kilobytes["Anonymous"] / 1024


def _open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
