"""The processes that read: what ends them, and what does not."""

import subprocess
import sys

# What a scheduler does to a job: the same signal to every process of it.
SCRIPT = """
import os, signal, time
from dataclasses import dataclass
from mug.data.loader import load

@dataclass(frozen=True)
class Squares:
    def batch(self, positions):
        return [position**2 for position in positions], []

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: print("asked to end", flush=True))
    batches = load(Squares(), iter([[i] for i in range(100)]), workers=2)
    for i, (batch, _) in enumerate(batches):
        assert batch == [i**2]
        if i == 3:
            os.killpg(0, signal.SIGTERM)
            time.sleep(0.5)
    print(i + 1, "batches")
"""


def test_a_signal_to_the_whole_job_leaves_the_workers_to_the_training_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    said, errors = process.communicate(timeout=120)
    assert (process.returncode, said.splitlines()) == (0, ["asked to end", "100 batches"]), errors
