"""A run that is killed goes on as if nothing had happened."""

import random
import shutil
import signal
import subprocess
import time

import pytest
from launch import PYTHON, ROOT, TOY, ZERO3, environment, losses, pretrain

OPTIONS = [
    *TOY,
    *("--trainer.max_steps", "24", "--trainer.eval_every", "7"),
    *("--checkpoint.every_steps", "3", "--checkpoint.keep", "2"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = pretrain(output, *OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def kill_at_a_row(output, row: int) -> None:
    """Start the run, and SIGKILL it as soon as its metrics hold `row` lines."""
    command = [*PYTHON, "run/pretrain.py", "--deepspeed", ZERO3, "--output", str(output), *OPTIONS]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = output / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < row):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"


@pytest.mark.slow
def test_killed_twice_at_random_steps_gives_the_same_losses_to_the_digit(tmp_path, undisturbed):
    output = tmp_path / "run"
    first, second = sorted(random.sample(range(2, 24), 2))
    print(f"killed at rows {first} and {second}")
    kill_at_a_row(output, first)
    kill_at_a_row(output, second)
    done = pretrain(output, *OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(output) == losses(undisturbed)
    assert losses(output, "eval") == losses(undisturbed, "eval")
    assert not list(output.glob("*.partial"))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, undisturbed):
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    shard = next((output / "checkpoint-24").glob("*optim_states.pt"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    done = pretrain(output, *OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"checkpoint-24: {shard.name} is damaged" in done.stdout
    assert "going on after step 21" in done.stdout
    assert losses(output) == losses(undisturbed)


@pytest.mark.slow
def test_a_finished_run_says_so(undisturbed):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    done = pretrain(undisturbed, *OPTIONS)
    assert done.returncode == 0
    assert "step 24 was the last one" in done.stdout
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(undisturbed):
    done = pretrain(undisturbed, *OPTIONS, "--model.depth", "3")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: {undisturbed}/checkpoint-24 is a checkpoint of another model: config depth is 2 there, 3 here;"
        " change the recipe back, or name another --output"
    ]
