"""The share of the steps that training waits for data."""

import pytest
from launch import PYTHON, TOY, pretrain, rows

from mug.run.training.metrics import DataWaitWarning


def test_the_alarm_sounds_once_while_waiting_continues():
    alarm = DataWaitWarning(workers=3)
    said = [alarm.check(share) for share in (0.9, 0.05, 0.06, 0.07, 0.5, 0.0, 0.2, 0.3)]
    assert [i for i, line in enumerate(said) if line] == [3, 7]
    assert said[3] == (
        "the data loader keeps training waiting 7% of the time: raise data.workers (now 3) or set data.decode to fast"
    )


@pytest.mark.slow
def test_it_is_logged_and_a_warning_names_the_loader(tmp_path):
    """Images are read between the steps, each batch of them in more than a second."""
    slowly = [*PYTHON, "tests/end_to_end/slow_data.py"]
    options = (*TOY, "--trainer.max_steps", "4", "--trainer.eval_samples", "1")
    done = pretrain(tmp_path / "run", *options, launcher=slowly)
    assert done.returncode == 0, done.stdout + done.stderr
    waits = [row["data_wait"] for row in rows(tmp_path / "run", "train")]
    # A step's data are waited for in the step before it.
    assert len(waits) == 4 and all(0.05 < wait < 1 for wait in waits[:3]) and waits[3] == 0
    assert (done.stdout + done.stderr).count("the data loader keeps training waiting") == 1
