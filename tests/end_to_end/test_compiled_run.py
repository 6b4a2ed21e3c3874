"""trainer.compile in the real command, by the compiler that users have."""

import pytest
from launch import TOY, losses, pretrain

CONSTANT_RATE = ("--trainer.base_learning_rate", "6e-3", "--trainer.min_learning_rate", str(6e-3 * 8 / 256))


@pytest.mark.slow
def test_a_compiled_run_gives_the_losses_of_another_and_resumes_without(tmp_path):
    eager, mixed = tmp_path / "eager", tmp_path / "mixed"
    for output, *options in ((eager, "5"), (mixed, "3", "--trainer.compile", "true"), (mixed, "5")):
        done = pretrain(output, *TOY, *CONSTANT_RATE, "--trainer.max_steps", *options)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming after step 3" in done.stdout
    rows = losses(mixed) + losses(mixed, "eval")[-1:], losses(eager) + losses(eager, "eval")
    assert len(rows[0]) == 6
    for mine, other in zip(*rows, strict=True):
        assert mine.pop("kind") == other.pop("kind")
        assert mine == pytest.approx(other, rel=1e-3)
    assert rows[0][0] != rows[1][0]  # to the last bit: it was compiled
