"""A run that is killed resumes as if nothing had happened."""

import random
import shutil

import pytest
from launch import TOY, kill_at_a_row, kill_when, losses, pretrain

from mug.run.state import checkpoint

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


@pytest.mark.slow
def test_killed_twice_at_random_steps_gives_the_same_losses_to_the_digit(tmp_path, undisturbed):
    output = tmp_path / "run"
    first, second = sorted(random.sample(range(2, 24), 2))
    print(f"killed at rows {first} and {second}")
    kill_at_a_row(output, first, *OPTIONS)
    kill_at_a_row(output, second, *OPTIONS, lives=2)
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
    kill_when(lambda: newest_partial(output) >= 9, output, *OPTIONS, "--checkpoint.asynchronous", "true")
    step = checkpoint.newest(output, warn=pytest.fail).step
    assert step % 3 == 0 and 6 <= step < 24  # one more where the commit was faster than the signal
    done = pretrain(output, *OPTIONS, "--checkpoint.asynchronous", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming after step {step}" in done.stdout
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
    assert "resuming after step 21" in done.stdout
    assert losses(output) == losses(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--trainer.global_batch", "16"], "global batch 8, this run has 16"),
        (["--seed", "5"], "was trained with seed 0 (now 5)"),
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
def test_more_steps_on_a_finished_run_name_both_learning_rates(tmp_path, undisturbed):
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    done = pretrain(output, *OPTIONS, "--trainer.max_steps", "26", "--trainer.eval_every", "26")
    assert done.returncode == 0, done.stdout + done.stderr
    last, first = (row["lr"] for row in losses(output) if row["step"] in (24, 25))
    line = f"warning: the learning rate jumps from {last:.1e} at step 24 to {first:.1e} at step 25"
    assert f"{line} (the run had 24 steps, and now has 26)" in done.stdout and first > 5 * last


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(undisturbed):
    done = pretrain(undisturbed, *OPTIONS, "--model.depth", "3")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: {undisturbed}/checkpoint-24 is a checkpoint of another model: config.depth is 2 there, 3 here;"
        " restore the recipe, or choose another --output"
    ]
