"""A command whose reader has gone away."""

import signal
import subprocess
import sys

import pytest

SPEAKS = """
from mug.run.training.console import run_command
import signal, sys

def main(console):
    asked = []
    if sys.argv[1:]:
        signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    sys.stdin.readline()
    for step in range(3):
        console.step(step, "a line that nobody reads")
        console.fail("nor this one")
    open(sys.argv[1], "w").write(f"saved; asked {len(asked)} times")

run_command(main)
"""


@pytest.mark.parametrize("listens", [True, False])
def test_who_is_not_read_any_more_is_asked_to_end_once(tmp_path, listens):
    """A run can then save what it has; others just end, as of a signal."""
    command = [sys.executable, "-c", SPEAKS, *([str(tmp_path / "said")] if listens else [])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait() == (0 if listens else -signal.SIGTERM)
    if listens:
        assert (tmp_path / "said").read_text() == "saved; asked 1 times"
