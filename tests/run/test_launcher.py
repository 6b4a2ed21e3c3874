"""A rank knows when its launcher is killed, and takes nobody else for one."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
# The rank: says that it knows its launcher, and after a line on its input whether that is gone, or was not within 2 s.
RANK = """
import sys, time
from mug.run.cluster.launcher import LAUNCHER
print(len(LAUNCHER.ancestor_pids), flush=True)
sys.stdin.readline()
deadline = time.monotonic() + float(sys.argv[1])
while not LAUNCHER.is_gone() and time.monotonic() < deadline:
    time.sleep(0.02)
print("gone" if LAUNCHER.is_gone() else "there", flush=True)
"""
# Starts the command in its arguments, and waits for it.
PARENT = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:], stdin=sys.stdin)"]
SCRIPT = ["sh", "-c", '"$@"; true', "script"]  # does not become what it starts


def ancestors(process: subprocess.Popen) -> list[psutil.Process]:
    """The first process, and what each has started."""
    first = psutil.Process(process.pid)
    return [first, *sorted(first.children(recursive=True), key=lambda one: one.create_time())]


@pytest.mark.parametrize(
    ("variable", "parents", "known", "victim", "says"),
    [
        ("TORCHELASTIC_RUN_ID", [PARENT], 1, 0, "gone"),
        ("TORCHELASTIC_RUN_ID", [PARENT, SCRIPT], 2, 0, "gone"),
        ("TORCHELASTIC_RUN_ID", [PARENT, PARENT], 1, 0, "there"),  # what had started torchrun
        ("CROSS_RANK", [PARENT, PARENT], 2, 0, "gone"),
        ("CROSS_RANK", [PARENT, PARENT], 2, 1, "gone"),
        ("CROSS_RANK", [SCRIPT, PARENT], 2, 0, "gone"),  # as sshd has it on another host
        ("CROSS_RANK", [PARENT, PARENT], 2, None, "there"),
        ("RANK", [PARENT], 0, 0, "there"),  # a program of the user's, not a launcher
        ("RANK", [SCRIPT], 0, 0, "there"),
    ],
)
def test_a_launcher_is_killed(variable, parents, known, victim, says):
    clean = {name: value for name, value in os.environ.items() if name not in ("TORCHELASTIC_RUN_ID", "CROSS_RANK")}
    seconds = "60" if says == "gone" else "0.5"
    command = [part for parent in parents for part in parent] + [sys.executable, "-c", RANK, seconds]
    launched = subprocess.Popen(
        command, cwd=ROOT, env=clean | {variable: "0"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    line = ancestors(launched)
    try:
        assert launched.stdout.readline().strip() == str(known)
        line = ancestors(launched)
        assert len(line) == len(parents) + 1
        if victim is not None:
            line[victim].kill()
            if victim == 0:
                launched.wait()
        launched.stdin.write("go on\n")
        launched.stdin.flush()
        assert launched.stdout.readline().strip() == says
    finally:
        for process in line:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        launched.communicate()
