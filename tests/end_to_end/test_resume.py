"""A run that is killed goes on as if nothing had happened."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

import pytest
from launch import PYTHON, ROOT, TOY, ZERO3, environment, losses, pretrain

from mug.run.training import checkpoint

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


def kill_when(reached: Callable[[], bool], output, *options: str) -> None:
    """Start the run, and SIGKILL it as soon as `reached()`."""
    command = [*PYTHON, "run/pretrain.py", "--deepspeed", ZERO3, "--output", str(output), *OPTIONS, *options]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not reached():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"


def kill_at_a_row(output, row: int, lives: int) -> None:
    """SIGKILL the run in its life number `lives` as soon as its metrics hold `row` lines."""
    metrics = output / "metrics.jsonl"

    def reached() -> bool:
        text = metrics.read_text() if metrics.exists() else ""
        begun = text.count('"event": "start"') + text.count('"event": "resume"')
        return begun >= lives and text.count("\n") >= row

    kill_when(reached, output)


@pytest.mark.slow
def test_killed_twice_at_random_steps_gives_the_same_losses_to_the_digit(tmp_path, undisturbed):
    output = tmp_path / "run"
    first, second = sorted(random.sample(range(2, 24), 2))
    print(f"killed at rows {first} and {second}")
    kill_at_a_row(output, first, lives=1)
    kill_at_a_row(output, second, lives=2)
    done = pretrain(output, *OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(output) == losses(undisturbed)
    assert losses(output, "eval") == losses(undisturbed, "eval")
    assert not list(output.glob("*.partial"))


def newest_partial(output) -> int:
    return max((int(path.stem.partition("-")[2]) for path in output.glob("checkpoint-*.partial")), default=0)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written_behind_training(tmp_path, undisturbed):
    output = tmp_path / "run"
    kill_when(lambda: newest_partial(output) >= 9, output, "--checkpoint.asynchronous", "true")
    step = checkpoint.newest(output, warn=pytest.fail).step
    assert step % 3 == 0 and 6 <= step < 24  # one more where the commit was faster than the signal
    done = pretrain(output, *OPTIONS, "--checkpoint.asynchronous", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on after step {step}" in done.stdout
    assert losses(output) == losses(undisturbed)
    assert [folder.name for folder in checkpoint.list_folders(output)] == ["checkpoint-24", "checkpoint-21"]
    assert not list(output.glob("*.partial"))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, undisturbed):
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    shard = next((output / "checkpoint-24").glob("exp_avg_sq-*.safetensors"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    done = pretrain(output, *OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"checkpoint-24: {shard.name} is damaged" in done.stdout
    assert "going on after step 21" in done.stdout
    assert losses(output) == losses(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--trainer.global_batch", "16"], "global batch 8, this run has 16"),
        (["--seed", "5"], "seed is 0 there, 5 here"),
        (["--model.text_length", "30"], "text_length is 20 there, 30 here"),
    ],
)
def test_what_would_break_the_order_of_samples_or_the_model_is_refused(undisturbed, options, names):
    done = pretrain(undisturbed, *OPTIONS, *options)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and names in done.stderr


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
