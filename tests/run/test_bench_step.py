"""The trainer's step next to a bare loop's, with and without compiled blocks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_all_sides_are_timed_and_compared_with_the_bare_loop():
    command = [sys.executable, "run/bench_step.py", "--deepspeed", "ds_configs/zero3.json", "--compile"]
    options = ["--preset", "tiny", "--batch", "2", "--steps", "1"]
    environment = {**os.environ, "MUG_COMPILE_BACKEND": "aot_eager"}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(
        r"bare loop (\d+) ms, trainer (\d+) ms, ratio (\S+), compiled trainer (\d+) ms, ratio (\S+) \(", done.stdout
    )
    bare, trainer, ratio, compiled, compiled_ratio = map(float, found.groups())
    assert ratio == pytest.approx(trainer / bare, rel=0.05)
    assert compiled_ratio == pytest.approx(compiled / bare, rel=0.05)
