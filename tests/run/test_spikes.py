"""What counts as a spike, and the checkpoint that a run resumes from after one."""

import os

import pytest
import torch
from safetensors.torch import save_file

from mug.run.common.errors import RunError
from mug.run.state import checkpoint
from mug.run.training.spikes import MIN_LOSSES, WINDOW, SpikeAlarm, rollback


def test_a_loss_is_compared_with_the_median_of_those_before():
    alarm = SpikeAlarm(2.0, [1.0] * MIN_LOSSES)
    assert [alarm.check(loss) for loss in (1.9, 2.1, 1.0, 2.1, float("nan"), 2.0)] == [0, 1, 0, 1, 0, 0]
    for _ in range(WINDOW):  # a plateau that is higher is no spike once it is what came before
        alarm.check(1.9)
    assert not alarm.check(3.7) and alarm.check(3.9)


def test_it_needs_some_losses_before_and_0_never_sounds():
    alarm, never = SpikeAlarm(2.0, [1.0] * (MIN_LOSSES - 1)), SpikeAlarm(0.0, [1.0] * WINDOW)
    assert not alarm.check(100.0) and alarm.check(1000.0)  # the first was the last that was needed
    assert not never.check(1e9)


def write_checkpoint(output, step: int) -> None:
    partial = checkpoint.open_partial(output, step)
    save_file({"x": torch.tensor([float(step)])}, partial / "weight.safetensors")
    files = {"weight.safetensors": checkpoint.checksum(partial / "weight.safetensors")}
    state = {"data": {"next_position": 8 * step, "skipped": [[0, 8]]}, "adam_steps": step}
    checkpoint.commit(output, step, files, state, {"tokenizer.json": "{}"}, keep=9)


def newest(output) -> checkpoint.Checkpoint:
    return checkpoint.newest(output, warn=pytest.fail)


@pytest.mark.parametrize(("back", "keep", "to"), [(1, 9, 6), (2, 9, 4), (3, 9, 2), (9, 9, 2), (9, 2, 4)])
def test_the_earlier_state_stands_under_the_later_step(tmp_path, back, keep, to):
    """One that is there beyond those to keep, as for a replay, is too old."""
    for step in (2, 4, 6):
        write_checkpoint(tmp_path, step)
    weight = (tmp_path / f"checkpoint-{to}" / "weight.safetensors").stat()
    assert rollback(tmp_path, back, step=7, next_position=56, keep=keep).step == to
    found = newest(tmp_path)
    assert found.step == 7 and (tmp_path / "latest").read_text() == "checkpoint-7"
    assert os.path.samestat((found.folder / "weight.safetensors").stat(), weight)
    assert found.manifest["data"] == {"next_position": 56, "skipped": [[0, 8], [8 * to, 56]]}
    assert found.manifest["adam_steps"] == to
    assert set(found.manifest["files"]) == {"weight.safetensors", "tokenizer.json"}


def test_it_outlives_the_checkpoint_that_it_was_made_of(tmp_path):
    write_checkpoint(tmp_path, 2)
    rollback(tmp_path, 1, step=7, next_position=56, keep=1)
    assert [folder.name for folder in checkpoint.list_folders(tmp_path)] == ["checkpoint-7"]
    assert newest(tmp_path).step == 7


def test_without_a_checkpoint_or_with_a_damaged_one_nothing_is_made(tmp_path):
    assert rollback(tmp_path, 1, step=7, next_position=56, keep=1) is None
    write_checkpoint(tmp_path, 2)
    (tmp_path / "checkpoint-2" / "weight.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="damaged"):
        rollback(tmp_path, 1, step=7, next_position=56, keep=1)
    assert not (tmp_path / "checkpoint-7").exists()
