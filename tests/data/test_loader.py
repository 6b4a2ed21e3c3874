"""The processes that read: what ends them, and what does not."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


# A batch of a quarter of a megabyte; what ends a worker, or all of them, is the argument.
FAILING = """
import os, signal, sys
from dataclasses import dataclass
from multiprocessing import forkserver
import torch
from mug.data.loader import load
from mug.run.common.console import run_command

@dataclass(frozen=True)
class Batches:
    kind: str

    def batch(self, positions):
        if self.kind == "killed" and positions[0] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "pickle" and positions[0] == 5:
            return lambda: "a batch that cannot be pickled", []
        if self.kind == "fork server" and positions[0] == 5:
            os.kill(os.getppid(), signal.SIGKILL)
        if self.kind == "rights" and positions[0] == 5:
            raise PermissionError(13, "Permission denied", "a/shard.tar")
        return torch.zeros(1 << 18, dtype=torch.uint8), []

def main(console):
    for number, _ in enumerate(load(Batches(sys.argv[1]), iter([[i] for i in range(100)]), workers=2)):
        console.info(f"batch {number}")

if __name__ == "__main__":
    run_command(main)
"""


def fail(tmp_path, kind: str, *before: str) -> str:
    """The one line with which the command ends, status 2."""
    script = tmp_path / "script.py"
    script.write_text(FAILING)
    command = [*before, sys.executable, str(script), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("killed", "which read data, was killed, for example out of memory: use fewer workers"),
        ("pickle", "local object"),
        ("fork server", "which read data, has ended with the process that started it"),
        ("rights", "a/shard.tar: Permission denied"),
    ],
)
def test_a_worker_that_fails_ends_the_command_with_its_reason(tmp_path, kind, says):
    assert says in fail(tmp_path, kind)


def private_shared_memory(size: str) -> list[str]:
    """What starts a command with a /dev/shm of its own, as a container has it."""
    return ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "sh"]


def can_have_private_shared_memory() -> bool:
    try:
        return subprocess.run([*private_shared_memory("1m"), "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_have_private_shared_memory(), reason="needs the right to mount")
@pytest.mark.parametrize("size", ["4k", "512k"])  # none for the queues, none for the batches
def test_a_shared_memory_that_is_too_small_is_named(tmp_path, size):
    """Docker gives a container 64 MB."""
    line = fail(tmp_path, "all well", *private_shared_memory(size))
    assert re.search(r"/dev/shm holds \d MB, of which \d are free: give it more \(docker run --shm-size 8g", line)


# A package of the same name in the current folder, as in a folder next to another checkout.
ELSEWHERE = """
import sys
from dataclasses import dataclass
import mug.data.stream
from mug.data.loader import load

@dataclass(frozen=True)
class Where:
    def batch(self, positions):
        return [module.__file__ for name, module in sys.modules.items() if name.startswith("mug.")], []

if __name__ == "__main__":
    ((files, _),) = load(Where(), iter([[0]]), workers=1)
    (root,) = {path.rpartition("/data/")[0] for path in files if "/data/" in path}
    print(root)
    assert root == mug.data.stream.__file__.rpartition("/data/")[0], root
"""


def test_workers_run_the_code_that_the_script_runs(tmp_path):
    """Not what the current folder holds, which Python 3.11's fork server would import first."""
    script = tmp_path / "scripts" / "script.py"
    script.parent.mkdir()
    script.write_text(ELSEWHERE)
    shutil.copytree(Path(__file__).parents[2] / "data", tmp_path / "mug" / "data")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
