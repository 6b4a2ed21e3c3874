"""bf16 on CPUs: what a GPU run computes in, through all of the trainer."""

import subprocess

import pytest
from launch import PYTHON, ROOT, TOY, environment, forks, kill_at_a_row, losses, pretrain, rows, torchrun

from mug.run.state import checkpoint

STEPS = 20
OPTIONS = [
    *TOY,
    *("--trainer.max_steps", str(STEPS), "--trainer.eval_every", "8", "--trainer.eval_samples", "8"),
    *("--checkpoint.every_steps", "4", "--checkpoint.asynchronous", "true"),
]
BF16 = ("--trainer.precision", "bf16")
TERMS = ("loss/total", "loss/pixels", "loss/caption")
LIVES = {  # DeepSpeed configuration and ranks
    "zero0": ("zero0", 1),
    "zero1": ("zero1", 1),
    "zero2": ("zero2", 1),
    "zero3": ("zero3", 1),
    "zero3_offload": ("zero3_offload", 1),
    "zero3 on two ranks": ("zero3", 2),
}


def run(output, config: str, ranks: int, *options: str) -> str:
    done = pretrain(output, *OPTIONS, *options, launcher=forks(ranks), config=f"ds_configs/{config}.json")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    output = tmp_path_factory.mktemp("fp32") / "run"
    run(output, "zero3", 1)
    return output


def assert_near(output, fp32) -> None:
    """Every logged and every evaluated loss within 2% of those in fp32."""
    for kind in ("train", "eval"):
        mine, exact = losses(output, kind), losses(fp32, kind)
        assert [row["step"] for row in mine] == [row["step"] for row in exact]
        assert [row["position"] for row in mine] == [row["position"] for row in exact]
        for row, other in zip(mine, exact, strict=True):
            for term in TERMS:
                assert row[term] == pytest.approx(other[term], rel=2e-2), f"{kind}, step {row['step']}"
    assert losses(output) != losses(fp32)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "ranks"), LIVES.values(), ids=LIVES)
def test_trains_is_killed_and_resumes_near_fp32(tmp_path, fp32, config, ranks):
    output = tmp_path / "run"
    launcher = torchrun(ranks) if ranks > 1 else PYTHON
    kill_at_a_row(output, 14, *OPTIONS, *BF16, launcher=launcher, config=f"ds_configs/{config}.json")
    saved = checkpoint.newest(output, warn=pytest.fail).step
    assert 0 < saved < STEPS
    assert f"resuming after step {saved}" in run(output, config, ranks, *BF16)
    assert_near(output, fp32)
    lives = [row for row in rows(output, "event") if row["event"] in ("start", "resume")]
    assert [row["precision"] for row in lives] == ["bf16", "bf16"]
    assert (output / "samples" / f"step-{STEPS}.png").is_file()


@pytest.mark.slow
def test_resumes_with_other_ranks_stages_and_precisions(tmp_path, fp32):
    """Checkpoints hold fp32 weights, whatever wrote them."""
    legs = [("zero1", 2, "bf16"), ("zero3", 1, "fp32"), ("zero2", 2, "bf16"), ("zero3_offload", 1, "bf16")]
    rate = ("--trainer.base_learning_rate", "6e-3", "--trainer.min_learning_rate", str(6e-3 * 8 / 256))  # constant
    for number, (config, ranks, precision) in enumerate(legs, 1):
        run(tmp_path, config, ranks, *rate, "--trainer.max_steps", str(5 * number), "--trainer.precision", precision)
    exact = tmp_path / "fp32"
    run(exact, "zero3", 1, *rate)
    curve = losses(tmp_path)
    assert [row["position"] for row in curve] == [8 * step for step in range(1, STEPS + 1)]
    for row, other in zip(curve, losses(exact), strict=True):
        for term in TERMS:
            assert row[term] == pytest.approx(other[term], rel=2e-2), f"step {row['step']}"


@pytest.mark.slow
def test_a_step_that_is_not_finite_can_be_replayed(tmp_path, monkeypatch):
    monkeypatch.setenv("POISON", "21")  # this position, in step 3
    poisoned = [*PYTHON, "tests/end_to_end/poisoned.py"]
    done = pretrain(tmp_path, *OPTIONS, *BF16, "--checkpoint.every_steps", "2", launcher=poisoned)
    assert done.returncode == 3 and "loss or gradient of step 3 is not finite; nothing was updated" in done.stderr
    assert checkpoint.newest(tmp_path, warn=pytest.fail).step == 2
    replay = [*poisoned, "run/replay.py", str(tmp_path / "replay" / "step-3.json")]
    again = subprocess.run(replay, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "step 3: 2 of 2 micro-batches gave the losses of the run; the gradient is not finite" in again.stdout
