"""One rank is asked to end, or is killed: what the others do, what is said, and what the exit status is."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch import DRAWINGS, ROOT, TOY, ZERO3, deepspeed, environment, forks, free_port, losses, pretrain, torchrun

from mug.run.cluster.rank_monitor import HEARTBEAT_SECONDS
from mug.run.state import checkpoint

STEPS = 40
SLOW = 180  # seconds, where it does not matter how many
FOR_EVER = 100_000
OPTIONS = [
    *TOY,
    *("--trainer.global_batch", "12", "--trainer.micro_batch", "2"),
    *("--trainer.max_steps", str(STEPS), "--trainer.eval_every", str(STEPS), "--trainer.eval_samples", "8"),
    *("--data.workers", "1", "--checkpoint.every_steps", "1000"),
]
SCRIPT = ["run/pretrain.py", "--deepspeed", ZERO3, *DRAWINGS]


class Job:
    """A command in the background, with what it says in a file."""

    def __init__(self, output: Path, command: list[str], steps: int = STEPS, **variables: str):
        self.output, self.said = output, output.with_suffix(f".said{variables.get('RANK', '')}")
        with self.said.open("w") as file:
            self.process = subprocess.Popen(
                [*command, *SCRIPT, "--output", str(output), *OPTIONS, "--trainer.max_steps", str(steps)],
                cwd=ROOT,
                env=environment() | variables,
                stdout=file,
                stderr=file,
            )

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank; the launcher's child, or the command itself."""
        found = psutil.Process(self.process.pid)
        for process in [found, *found.children(recursive=True)]:
            if SCRIPT[0] in process.cmdline() and process.environ().get("RANK") == str(rank):
                return process
        raise AssertionError(f"no rank {rank}: {self.text()}")

    def text(self) -> str:
        return self.said.read_text()

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds)


def start_ranks(output: Path, world: int, steps: int = STEPS) -> list[Job]:
    """As srun starts them: nobody ends the others when one ends."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world)}
    place |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    return [Job(output, [sys.executable], steps, RANK=str(r), LOCAL_RANK=str(r), **place) for r in range(world)]


def wait_for_rows(output: Path, count: int) -> None:
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() or metrics.read_text().count('"kind": "train"') < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = pretrain(output, *OPTIONS, launcher=forks(2))
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(output)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_one_rank_is_asked_to_end(tmp_path, undisturbed, number):
    output = tmp_path / "run"
    ranks = start_ranks(output, 2)
    wait_for_rows(output, 4)
    ranks[1].process.send_signal(number)
    begin = time.monotonic()
    assert [rank.wait(30) for rank in ranks] == [75, 75]
    print(f"all ranks had ended {time.monotonic() - begin:.1f} s after {number.name}")
    found = checkpoint.newest(output, warn=pytest.fail)
    assert found.step < STEPS and len(found.manifest["files"]) == 7  # three of each rank, and the tokenizer
    line = f"{number.name}: step {found.step} is saved; rerun the same command to resume"
    assert line in ranks[0].text() and not ranks[1].text()
    done = pretrain(output, *OPTIONS, launcher=forks(2))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming after step {found.step}" in done.stdout
    assert losses(output) == undisturbed


@pytest.mark.slow
def test_a_launcher_and_all_below_it_are_asked_to_end(tmp_path):
    """torchrun passes SIGTERM on to each rank's process group, with the workers that read the data."""
    job = Job(tmp_path / "run", torchrun(2))
    wait_for_rows(job.output, 4)
    job.process.terminate()
    job.wait(SLOW)
    found = checkpoint.newest(job.output, warn=pytest.fail)
    assert f"SIGTERM: step {found.step} is saved" in job.text()
    assert "Traceback (most recent call last)" not in (job.output / "logs" / "rank0.log").read_text()


@pytest.mark.slow
def test_the_deepspeed_launcher_hands_on_the_exit_status(tmp_path):
    job = Job(tmp_path / "run", deepspeed(2))
    wait_for_rows(job.output, 4)
    job.rank(1).send_signal(signal.SIGUSR1)
    assert job.wait(SLOW) == 75
    found = checkpoint.newest(job.output, warn=pytest.fail)
    assert f"SIGUSR1: step {found.step} is saved" in job.text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [None, deepspeed, torchrun], ids=["no launcher", "deepspeed", "torchrun"])
def test_a_rank_is_killed(tmp_path, launcher):
    output = tmp_path / "run"
    jobs = [Job(output, launcher(3), steps=FOR_EVER)] if launcher else start_ranks(output, 3, FOR_EVER)
    wait_for_rows(output, 4)
    time.sleep(3 * HEARTBEAT_SECONDS)  # all have said that they train
    victim = jobs[0].rank(1) if launcher else jobs[1].rank(1)
    victim.kill()
    begin = time.monotonic()
    codes = [job.wait(60) for job in jobs]
    print(f"all ranks had ended {time.monotonic() - begin:.1f} s after the kill")
    assert codes == ([75, -signal.SIGKILL, 75] if not launcher else codes) and 0 not in codes
    line = f"error: rank 1 (host {os.uname().nodename}, pid {victim.pid}, step"
    lines = [text for text in jobs[0].text().splitlines() if text.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith(line) and "is lost: its process ended" in lines[0]
    for rank in (0, 2):
        assert line.removeprefix("error: ") in (output / "logs" / f"rank{rank}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
def test_the_launcher_is_killed(tmp_path, launcher):
    """DeepSpeed's is two processes; its ranks are not children of the one that a user knows."""
    job = Job(tmp_path / "run", launcher(2), steps=FOR_EVER)
    wait_for_rows(job.output, 4)
    ranks = [job.rank(0), job.rank(1)]
    job.process.kill()
    begin = time.monotonic()
    assert not psutil.wait_procs(ranks, timeout=60)[1]
    print(f"all ranks had ended {time.monotonic() - begin:.1f} s after the launcher was killed")
    found = checkpoint.newest(job.output, warn=pytest.fail)
    assert f"SIGTERM: step {found.step} is saved" in job.text()
    logs = [path.read_text() for path in (job.output / "logs").iterdir()]
    assert any("the launcher of this rank is gone" in log for log in logs)  # who sees it first informs the others


@pytest.mark.slow
def test_a_rank_without_a_launcher_outlives_the_shell_that_started_it(tmp_path):
    """As with nohup or setsid."""
    job = Job(tmp_path / "run", ["sh", "-c", '"$@" & sleep 1000', "sh", sys.executable], steps=FOR_EVER)
    wait_for_rows(job.output, 4)
    started = psutil.Process(job.process.pid).children()
    (rank,) = [one for one in started if SCRIPT[0] in one.cmdline()]
    job.process.kill()
    try:
        assert psutil.wait_procs([rank], timeout=2 * HEARTBEAT_SECONDS + 2)[1] == [rank]
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_a_rank_that_falls_silent_is_not_waited_for(tmp_path):
    """As when its machine is gone: nothing closes the connection."""
    ranks = start_ranks(tmp_path / "run", 2, FOR_EVER)
    wait_for_rows(tmp_path / "run", 4)
    time.sleep(3 * HEARTBEAT_SECONDS)  # both have said that they train
    ranks[1].process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    assert ranks[0].wait(SLOW) == 75
    print(f"rank 0 had ended {time.monotonic() - begin:.1f} s after rank 1 was stopped")
    pid = ranks[1].process.pid
    assert re.search(rf"error: no heartbeat from rank 1 \(host \S+, pid {pid}, step .*\) for 40 s", ranks[0].text())
    ranks[1].process.kill()
    ranks[1].wait(20)
