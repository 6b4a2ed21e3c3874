"""The commit of a checkpoint: what a crash between any two of its steps leaves, what damage does, what is kept."""

import errno
import json
import os
import threading

import pytest
import torch
from torch import nn

from mug.model.objectives.objective import Context, Objective
from mug.run import replay
from mug.run.common.errors import RunError
from mug.run.state import checkpoint, saver
from mug.run.state.replay_bundle import Bundle
from mug.run.state.replay_bundle import write as write_bundle
from mug.run.state.saver import Saver
from mug.run.state.sharded_state import ParamSlice, SavedState
from mug.run.training.recipe import CheckpointConfig

pytestmark = pytest.mark.usefixtures("one_rank")
WEIGHT, FIRST_MOMENT = (f"{kind}-00000-of-00001.safetensors" for kind in ("weight", "exp_avg"))


class Linear(Objective):
    def __init__(self):
        super().__init__(None, Context())
        self.weight, self.bias = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2))

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Engine:
    """What the saver asks a DeepSpeed engine of stage 0 for."""

    global_rank, world_size, averages = 0, 1, {}

    def __init__(self):
        self.module = Linear()
        self.optimizer = self.basic_optimizer = torch.optim.AdamW(self.module.parameters())
        self.train()

    def train(self) -> None:
        self.module(torch.randn(1, 3)).sum().backward()
        self.optimizer.step()

    def zero_optimization_stage(self) -> int:
        return 0


def saver_of(output, keep: int = 2, asynchronous: bool = False, **config) -> Saver:
    return Saver(
        Engine(), output, CheckpointConfig(keep=keep, asynchronous=asynchronous, **config), lambda step, seconds: None
    )


def begin(saver: Saver, step: int) -> None:
    saver.save(step, {"data": {"next_position": step * 8}}, {"tokenizer.json": "{}"})


def save(output, step: int, keep: int = 2, asynchronous: bool = False) -> None:
    one = saver_of(output, keep, asynchronous)
    begin(one, step)
    one.finish()


def names(output) -> list[str]:
    return [folder.name for folder in checkpoint.list_folders(output)]


def newest_step(output) -> int:
    return checkpoint.newest(output, warn=lambda line: None).step


def test_the_newest_are_kept(tmp_path):
    for step in (2, 4, 6, 10):
        save(tmp_path, step)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-6"]
    assert (tmp_path / "latest").read_text() == "checkpoint-10"
    assert not list(tmp_path.glob("*.partial"))


def test_what_a_replay_bundle_starts_from_is_kept_as_long_as_the_bundle(tmp_path):
    save(tmp_path, 2, keep=1)
    bundle = write_bundle(tmp_path, Bundle(3, "checkpoint-2", "x.json", 1, 0, {}, [], {}))
    write_bundle(tmp_path, Bundle(1, None, "x.json", 1, 0, {}, [], {}))
    (tmp_path / "replay" / "step-9.json").write_text('{"checkpoint": "checkpoint-4"')  # cut by a crash
    for step in (4, 6):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-2"]
    assert replay.find_state(tmp_path / "checkpoint-2").step == 2
    bundle.unlink()
    save(tmp_path, 8, keep=1)
    assert names(tmp_path) == ["checkpoint-8"]


def test_a_replay_without_its_checkpoint_is_one_line(tmp_path):
    with pytest.raises(RunError, match=r"^\S+checkpoint-2, the state before the step, is missing; restore it there.*$"):
        replay.find_state(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("victim", [WEIGHT, FIRST_MOMENT, "tokenizer.json", "manifest.json"])
def test_a_changed_byte_is_found_in_any_file(tmp_path, victim):
    save(tmp_path, 2)
    save(tmp_path, 4)
    path = tmp_path / "checkpoint-4" / victim
    text = path.read_bytes()
    path.write_bytes(text.replace(b"32", b"72") if victim == "manifest.json" else bytes([text[0] ^ 1]) + text[1:])
    warnings = []
    assert checkpoint.newest(tmp_path, warnings.append).step == 2
    assert len(warnings) == 1 and f"checkpoint-4: {victim} is damaged" in warnings[0]


def test_without_a_whole_checkpoint_the_run_does_not_start_over(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "checkpoint-2" / WEIGHT).unlink()
    with pytest.raises(
        RunError, match="none of its 1 checkpoints is intact; restore a copy of one, or name another folder"
    ):
        newest_step(tmp_path)
    assert checkpoint.newest(tmp_path / "new", warn=print) is None


@pytest.mark.parametrize("step", [3, 4, 5])  # before, at and after that of the damaged one
def test_a_damaged_one_does_not_count_among_those_that_are_kept(tmp_path, step):
    save(tmp_path, 1)
    save(tmp_path, 2)
    save(tmp_path, 4)
    (tmp_path / "checkpoint-4" / WEIGHT).write_bytes(b"")
    assert checkpoint.resume(tmp_path, lambda line: None).step == 2
    assert names(tmp_path) == ["checkpoint-2"]
    assert (tmp_path / "latest").read_text() == "checkpoint-2"
    save(tmp_path, step)
    assert names(tmp_path) == [f"checkpoint-{step}", "checkpoint-2"]
    assert newest_step(tmp_path) == step
    assert not list(tmp_path.glob("*.partial"))


def test_one_that_only_reads_leaves_the_damaged_where_it_is(tmp_path):
    save(tmp_path, 2)
    save(tmp_path, 4)
    (tmp_path / "checkpoint-4" / WEIGHT).write_bytes(b"")
    assert newest_step(tmp_path) == 2
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-2"]


CALLS = [
    (checkpoint, name, call) for name in ("checksum", "_write_text", "_sync_folder", "_prune") for call in (1, 2, 3)
]
CALLS += [(saver, "write_pieces", call) for call in (1, 3)] + [(saver, "_copy", 1), (checkpoint, "open_partial", 1)]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "asynchronous"])
@pytest.mark.parametrize(("module", "broken", "call"), CALLS)
def test_a_crash_inside_a_save_leaves_a_loadable_checkpoint(tmp_path, monkeypatch, module, broken, call, asynchronous):
    save(tmp_path, 2, keep=1)
    calls, real = 0, getattr(module, broken)

    def crash(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, broken, crash)
    try:
        save(tmp_path, 4, keep=1, asynchronous=asynchronous)
    except (KeyboardInterrupt, RunError):
        assert newest_step(tmp_path) in (2, 4)
    else:
        assert calls < call, "the crash must reach the caller"
    monkeypatch.undo()
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["checkpoint-6"] and not list(tmp_path.glob("*.partial"))


@pytest.fixture
def writing(monkeypatch):
    """Holds the thread that writes until it is set."""
    go, real = threading.Event(), saver._write

    def wait(*arguments):
        assert go.wait(20)
        return real(*arguments)

    monkeypatch.setattr(saver, "_write", wait)
    return go


def test_an_asynchronous_save_keeps_the_state_of_its_step(tmp_path, writing):
    one = saver_of(tmp_path, asynchronous=True)
    before = one.engine.module.weight.detach().clone()
    moment = one.engine.optimizer.state[one.engine.module.weight]["exp_avg"].clone()
    begin(one, 2)
    one.engine.train()
    writing.set()
    one.finish()
    saved = SavedState(tmp_path / "checkpoint-2")
    assert torch.equal(saved.read("weight", ParamSlice("weight", 0), 6), before.flatten())
    assert torch.equal(saved.read("exp_avg", ParamSlice("weight", 0), 6), moment.flatten())
    assert not torch.equal(one.engine.module.weight, before)
    assert checkpoint.verify(tmp_path / "checkpoint-2").manifest["adam_steps"] == 1


def test_it_is_committed_only_when_it_is_written(tmp_path, writing):
    committed = []
    one = saver_of(tmp_path, asynchronous=True)
    one.committed = lambda step, seconds: committed.append((step, sorted(seconds)))
    begin(one, 2)
    one.poll()
    assert names(tmp_path) == [] and committed == []
    writing.set()
    one.pending.written.result()
    one.poll()
    assert names(tmp_path) == ["checkpoint-2"] and committed == [(2, ["seconds", "write_seconds"])]
    one.poll()
    assert len(committed) == 1


def test_the_next_save_waits_for_the_one_before(tmp_path, writing):
    one = saver_of(tmp_path, asynchronous=True)
    begin(one, 2)
    threading.Timer(0.2, writing.set).start()
    begin(one, 4)
    assert names(tmp_path) == ["checkpoint-2"]
    one.finish()
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-2"]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "asynchronous"])
def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path, monkeypatch, asynchronous):
    save(tmp_path, 2)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"checkpoint-4 cannot be written \(rank 0: .*No space left on device\)"):
        save(tmp_path, 4, asynchronous=asynchronous)
    assert newest_step(tmp_path) == 2


def test_a_save_is_due_after_minutes_without_one(tmp_path, monkeypatch):
    clock = 0.0
    monkeypatch.setattr(saver.time, "monotonic", lambda: clock)
    one, never = saver_of(tmp_path, every_minutes=0.5), saver_of(tmp_path)
    clock = 29.0
    assert not one.interval_elapsed()
    clock = 31.0
    assert one.interval_elapsed() and not never.interval_elapsed()
    begin(one, 2)
    clock = 60.0
    assert not one.interval_elapsed()


def test_a_run_that_has_updated_nothing_yet_is_saved_and_then_trains_as_any(tmp_path):
    """Its first batch was skipped; an optimizer without ZeRO has no state then."""
    torch.manual_seed(0)
    one = saver_of(tmp_path)
    module, fresh = one.engine.module, nn.Linear(3, 2)
    one.engine.optimizer = one.engine.basic_optimizer = torch.optim.AdamW(module.parameters())
    fresh.load_state_dict(module.state_dict())
    oracle = torch.optim.AdamW(fresh.parameters())
    begin(one, 1)
    saved = SavedState(tmp_path / "checkpoint-1")
    assert torch.equal(saved.read("weight", ParamSlice("weight", 0), 6), fresh.weight.flatten())
    assert not saved.read("exp_avg", ParamSlice("weight", 0), 6).any()
    assert not saved.read("exp_avg_sq", ParamSlice("bias", 0), 2).any()
    assert checkpoint.verify(tmp_path / "checkpoint-1").manifest["adam_steps"] == 0
    for step in range(2):
        for model, optimizer in ((module, one.engine.optimizer), (fresh, oracle)):
            optimizer.zero_grad()
            model(torch.tensor([[1.0, step, -2.0]])).square().sum().backward()
            optimizer.step()
    assert torch.equal(module.weight, fresh.weight) and torch.equal(module.bias, fresh.bias)


def test_the_state_comes_back_as_it_was(tmp_path):
    save(tmp_path, 2)
    manifest = checkpoint.verify(tmp_path / "checkpoint-2").manifest
    assert manifest["data"] == {"next_position": 16}
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    assert set(manifest["files"]) == {f"{kind}-00000-of-00001.safetensors" for kind in kinds} | {"tokenizer.json"}
    assert json.loads((tmp_path / "checkpoint-2" / "tokenizer.json").read_text()) == {}
