"""What stands in a run's way is said in one line: a port or folder in use, another recipe, no room on the disk."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable

import pytest
from launch import PYTHON, ROOT, TOY, ZERO3, deepspeed, environment, losses, pretrain

from mug.run.state import checkpoint

SHORT = [*TOY, "--trainer.max_steps", "4", "--checkpoint.every_steps", "2", "--checkpoint.keep", "1"]


def assert_one_line(done, *names: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(name in errors[0] for name in names), done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    done = pretrain(output, *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@pytest.mark.slow
def test_a_port_in_use(tmp_path):
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        launcher = [*deepspeed(1), "--master_port", port]
        done = pretrain(tmp_path / "run", *SHORT, launcher=launcher)
    assert_one_line(done, f"port {port} of {socket.gethostname()} is in use")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_in_use(tmp_path):
    output = tmp_path / "run"
    command = [*PYTHON, "run/pretrain.py", "--deepspeed", ZERO3, "--output", str(output), *TOY]
    first = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (output / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.1)
        second = pretrain(output, *SHORT)
        assert first.poll() is None
        assert_one_line(second, str(output), f"pid {first.pid} on {socket.gethostname()}")
    finally:
        first.kill()
        first.wait()


CHANGES = ["--trainer.weight_decay", "0.1", "--loss_weights.caption", "0.3", "--data.crop_scale", "[0.5, 0.9]"]


@pytest.mark.slow
def test_another_recipe_is_refused_unless_allowed(finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    longer = [*SHORT, "--trainer.max_steps", "6", "--data.workers", "1", "--trainer.eval_every", "3"]
    done = pretrain(output, *longer, *CHANGES)
    listed = (
        "trainer.weight_decay 0.05 (now 0.1)",
        "loss_weights.caption 0.1 (now 0.3)",
        "data.crop_scale [1.0, 1.0] (now [0.5, 0.9])",
    )
    assert_one_line(done, *listed, "checkpoint-4", "--allow_changes")
    assert "trainer.max_steps" not in done.stderr and "data.workers" not in done.stderr
    assert (output / "latest").read_text() == "checkpoint-4"

    done = pretrain(output, *longer, *CHANGES, "--allow_changes", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: " in done.stdout and all(name in done.stdout for name in listed)
    assert [row["step"] for row in losses(output)] == [1, 2, 3, 4, 5, 6]

    done = pretrain(output, *longer, *CHANGES)  # what it was allowed to become, it now is
    assert done.returncode == 0 and "step 6 was the last one" in done.stdout


def assert_goes_on(output, reference, room: Callable[[], object]) -> None:
    """What the full disk left is whole; with room made, the run ends as if nothing had been."""
    assert checkpoint.verify(output / (output / "latest").read_text()).step == 2
    room()
    done = pretrain(output, *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming after step 2" in done.stdout
    assert losses(output) == losses(reference)
    assert [folder.name for folder in checkpoint.list_folders(output)] == ["checkpoint-4"]
    assert not list(output.glob("*.partial"))


@pytest.mark.slow
def test_files_too_large_for_the_users_limit(finished, tmp_path):
    """A limit on a file's size stops a shard in the middle, as a quota would."""
    largest = max(file.stat().st_size for file in (finished / "checkpoint-4").iterdir())
    output = tmp_path / "run"
    two_steps = [*SHORT, "--trainer.max_steps", "2"]
    assert_one_line(pretrain(output, *two_steps, launcher=["prlimit", f"--fsize={largest // 2}", *PYTHON]), "File too")
    assert not (output / "latest").exists() and not checkpoint.list_folders(output)


@pytest.fixture
def small_disk(tmp_path, finished):
    """A disk with room for one checkpoint and a half."""
    size = sum(file.stat().st_size for file in (finished / "checkpoint-4").iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "none", disk])
    if mounted.returncode:
        pytest.skip("needs root, to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_while_saving(finished, small_disk):
    output = small_disk / "run"
    assert_one_line(pretrain(output, *SHORT), "checkpoint-4 cannot be written", "No space left", "free disk space")

    def make_room():
        subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)

    assert_goes_on(output, finished, make_room)


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start(small_disk):
    with (small_disk / "ballast").open("wb") as ballast:
        free = os.statvfs(small_disk)
        ballast.write(b"\0" * free.f_bavail * free.f_bsize)
    assert_one_line(pretrain(small_disk / "run", *SHORT), "No space left", "free disk space")
