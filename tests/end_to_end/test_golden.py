"""Golden losses: a change that is not about computation cannot move them.

After a change that is, record them again and give the reason in the commit: python tests/end_to_end/test_golden.py
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from launch import PYTHON, losses, pretrain

from mug.run.training.recipe import RECIPES

GOLDEN = Path(__file__).with_name("golden_losses.json")


def short_run(output: Path) -> list[dict[str, float]]:
    """The losses of the first 20 steps of MUG on OpenMoji's drawings, on one CPU rank."""
    recipe = RECIPES / "mug" / "openmoji_tiny.yaml"
    more = ["--trainer.max_steps", "20", "--trainer.log_every", "1"]
    done = pretrain(output, "--config", str(recipe), *more, launcher=PYTHON)
    assert done.returncode == 0, done.stdout + done.stderr
    return [{name: row[name] for name in row if name.startswith(("loss/", "grad_norm"))} for row in losses(output)]


@pytest.mark.slow
def test_a_short_run_gives_the_golden_losses(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == 20
    for step, (mine, expected) in enumerate(zip(short_run(tmp_path / "run"), golden, strict=True), 1):
        assert mine == pytest.approx(expected, abs=1e-4), f"step {step}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        rows = short_run(Path(folder) / "run")
    GOLDEN.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    sys.stdout.write(f"{GOLDEN}: {rows[0]} to {rows[-1]}\n")
