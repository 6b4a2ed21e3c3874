"""What surrounds a run: its locale, its terminal, its variables, its folder's rights, the room on its disk."""

import fcntl
import os
import select
import signal
import subprocess
import termios
import threading
import time

import psutil
import pytest
from launch import DRAWINGS, PYTHON, ROOT, TOY, ZERO3, deepspeed, environment, free_port, pretrain, rows

from mug.run.state import checkpoint

SHORT = [*TOY, "--trainer.max_steps", "2", "--trainer.eval_samples", "8"]


def run_script(name: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
    """A command of run/ to its end."""
    command = [*PYTHON, f"run/{name}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment() | variables, capture_output=True, encoding="utf-8")


@pytest.mark.slow
def test_a_locale_without_utf_8_takes_nothing_away(tmp_path):
    """tokenizer.json has characters that ASCII and Latin-1 have not."""
    output = tmp_path / "run"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    options = ["--deepspeed", ZERO3, "--output", output, *DRAWINGS, *SHORT, "--data.workers", "1"]
    done = run_script("pretrain", *options, **locale)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows(output, "train")) == 2 and (output / "checkpoint-2").is_dir()
    assert "’" in (output / "checkpoint-2" / "tokenizer.json").read_text(encoding="utf-8")
    done = run_script("report", output, "--out", tmp_path / "report.html", **locale)
    assert done.returncode == 0, done.stdout + done.stderr


class OnATerminal:
    """A command on a terminal of its own, which can be closed as a window is, or as a lost connection's."""

    def __init__(self, command: list[str]):
        self.terminal, inside = os.openpty()

        def control():
            os.setsid()
            fcntl.ioctl(inside, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=inside, stdout=inside, stderr=inside, preexec_fn=control
        )
        os.close(inside)
        self.closed = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        while not self.closed.is_set():
            if select.select([self.terminal], [], [], 0.1)[0]:
                os.read(self.terminal, 1 << 16)

    def close(self) -> None:
        self.closed.set()
        self.reader.join()
        os.close(self.terminal)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [PYTHON, deepspeed(2)], ids=["python", "deepspeed"])
def test_a_closed_terminal_leaves_a_checkpoint(tmp_path, launcher):
    output = tmp_path / "run"
    options = ["--deepspeed", ZERO3, "--output", str(output), *TOY, "--trainer.max_steps", "100000"]
    job = OnATerminal([*launcher, "run/pretrain.py", *options, "--data.workers", "1", "--trainer.eval_every", "100000"])
    deadline = time.monotonic() + 600
    while not (output / "metrics.jsonl").exists() or len(rows(output, "train")) < 3:
        assert time.monotonic() < deadline and job.process.poll() is None
        time.sleep(0.1)
    started = psutil.Process(job.process.pid)
    ranks = [one for one in [started, *started.children(recursive=True)] if one.environ().get("LOCAL_RANK")]
    job.close()
    status = job.process.wait(120)
    # DeepSpeed's launcher does not answer, unless its ranks have ended before the signal reaches it.
    assert status in ([75] if launcher == PYTHON else [-signal.SIGHUP, 75])
    assert not psutil.wait_procs(ranks, timeout=120)[1]
    found = checkpoint.newest(output, warn=pytest.fail)
    assert found.step >= 3 and not list(output.glob("*.partial"))


VARIABLES = {
    "RANK=3": "RANK=3 is set without WORLD_SIZE",
    "MASTER_PORT=http": "MASTER_PORT=http in the environment is not an integer",
    "MUG_RENDEZVOUS_SECONDS=a while": "MUG_RENDEZVOUS_SECONDS=a while is not a duration",
    "MUG_CACHE=~nobody of this name/cache": "cache folder '~nobody of this name/cache'",
    "MUG_ATTENTION_BACKEND=fastest": "backend='fastest' is not one of auto,",
    "MUG_MASKED_PATCH_LOSS_BACKEND=fastest": "backend='fastest' is not one of auto,",
    "GLOO_SOCKET_IFNAME=none9": "GLOO_SOCKET_IFNAME names none9; this host has",
}


@pytest.mark.slow
@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_that_cannot_be_is_one_line(tmp_path, variable):
    name, _, value = variable.partition("=")
    options = ["--deepspeed", ZERO3, "--output", tmp_path / "run", *SHORT]
    done = run_script("pretrain", *options, **{name: value})
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {VARIABLES[variable]}")


@pytest.mark.slow
def test_ranks_without_a_local_rank_train(tmp_path):
    """Kubeflow's PyTorchJob starts each in a pod of its own."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [*PYTHON, "run/pretrain.py", "--deepspeed", ZERO3, "--output", str(tmp_path / "run"), *SHORT]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=environment() | place | {"RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert rows(tmp_path / "run", "event")[0]["world_size"] == 2


PRIVATE_SHARED_MEMORY = [
    "unshare",
    "--mount",
    "sh",
    "-c",
    'mount -t tmpfs -o size=100k tmpfs /dev/shm && exec "$@"',
    "sh",
]
# Root that may not pass over the rights of files.
AS_ANOTHER_USER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"]


def works(before: list[str]) -> bool:
    """Whether the system lets a command be started in this way."""
    try:
        return subprocess.run([*before, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not works(PRIVATE_SHARED_MEMORY), reason="needs the right to mount")
def test_a_container_with_little_shared_memory(tmp_path):
    """Training waited until hang_minutes, and then asked to be started again."""
    launcher = [*PRIVATE_SHARED_MEMORY, *PYTHON]
    done = pretrain(tmp_path / "run", *SHORT, "--data.workers", "2", launcher=launcher)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: process ") and "No space left on device" in line and "--shm-size" in line


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not works(AS_ANOTHER_USER), reason="needs root and setpriv")
@pytest.mark.parametrize("victim", [".lock", "metrics.jsonl", "logs"])
def test_another_users_file_in_the_runs_folder(tmp_path, victim):
    output = tmp_path / "run"
    (output / "logs").mkdir(parents=True)
    for name in (".lock", "metrics.jsonl"):
        (output / name).touch()
    os.chown(output / victim, 65534, 65534)
    (output / victim).chmod(0o700)
    done = pretrain(output, *SHORT, launcher=[*AS_ANOTHER_USER, *PYTHON])
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {output / victim}") and "Permission denied; give this user permission" in line
