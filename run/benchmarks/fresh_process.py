"""A measurement in a process of its own, as the peak memory of a process cannot be taken back."""

import json
import resource
import subprocess
import sys
from typing import Any

import torch

from mug.run.common.errors import RunError


def in_a_process(module: str, label: str, **options: Any) -> dict[str, Any]:
    """Returns the JSON object that `python -m MODULE JSON` prints in its last line.

    Raises:
        RunError: it failed; the message has `label` and the last line of its errors.
    """
    command = [sys.executable, "-m", module, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        last = next(reversed(done.stderr.splitlines()), "killed, perhaps out of memory")
        raise RunError(f"the process of {label} ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_mb(device: str) -> float:
    """Returns the peak memory so far: of the GPU, or of the machine by the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
