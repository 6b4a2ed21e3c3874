"""Measures where the time from the command to the first step goes."""

import os
import time
from pathlib import Path


class StartupTimer:
    """Seconds of each phase since the process began; a phase lasts from the end of the one before."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = _process_start()
        self.began = time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - self.last)  # Unix seconds

    def end(self, name: str) -> None:
        """End the phase `name`; only the first call counts."""
        if name not in self.seconds:
            now = time.clock_gettime(time.CLOCK_BOOTTIME)
            self.seconds[name] = now - self.last
            self.last = now

    def metrics(self) -> dict[str, float]:
        """Returns `seconds/PHASE`, and `seconds/total`."""
        seconds = {**self.seconds, "total": sum(self.seconds.values())}
        return {f"seconds/{name}": round(value, 3) for name, value in seconds.items()}


def _process_start() -> float:
    """Returns seconds since the machine's boot, to 0.01 s: field 22 of proc(5)'s stat."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
