"""The commit of a checkpoint: what a crash between any two of its steps leaves, what damage does, what is kept."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from mug.run.training import checkpoint, hardware
from mug.run.training.errors import RunError


class Engine:
    """Writes what a DeepSpeed engine of one rank writes: files in a folder named by the tag."""

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "weights.pt").write_bytes(b"weights of " + tag.encode())
        (Path(folder) / tag / "optimizer.pt").write_bytes(b"optimizer of " + tag.encode())


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{hardware._free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(output, step: int, keep: int = 2) -> None:
    checkpoint.save(Engine(), output, step, {"data": {"next_position": step * 8}}, {"tokenizer.json": "{}"}, keep)


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


@pytest.mark.parametrize("victim", ["weights.pt", "tokenizer.json", "manifest.json"])
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
    (tmp_path / "checkpoint-2" / "weights.pt").unlink()
    with pytest.raises(RunError, match="none of its 1 checkpoints is whole"):
        newest_step(tmp_path)
    assert checkpoint.newest(tmp_path / "new", warn=print) is None


def test_a_save_after_falling_back_keeps_the_good_and_drops_the_damaged(tmp_path):
    save(tmp_path, 2, keep=1)
    save(tmp_path, 4, keep=2)
    (tmp_path / "checkpoint-4" / "weights.pt").write_bytes(b"")
    assert newest_step(tmp_path) == 2
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["checkpoint-3"]
    assert newest_step(tmp_path) == 3


@pytest.mark.parametrize("broken", ["_seal", "_write_text", "_sync_folder", "_prune"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_crash_inside_a_save_leaves_a_loadable_checkpoint(tmp_path, monkeypatch, broken, call):
    save(tmp_path, 2, keep=1)
    calls, real = 0, getattr(checkpoint, broken)

    def crash(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(checkpoint, broken, crash)
    try:
        save(tmp_path, 4, keep=1)
    except KeyboardInterrupt:
        assert newest_step(tmp_path) in (2, 4)
    else:
        assert calls < call, "the crash must reach the caller"
    monkeypatch.undo()
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["checkpoint-6"] and not list(tmp_path.glob("*.partial"))


def test_the_state_comes_back_as_it_was(tmp_path):
    save(tmp_path, 2)
    manifest = checkpoint.verify(tmp_path / "checkpoint-2").manifest
    assert manifest["data"] == {"next_position": 16}
    assert set(manifest["files"]) == {"weights.pt", "optimizer.pt", "tokenizer.json"}
    assert json.loads((tmp_path / "checkpoint-2" / "tokenizer.json").read_text()) == {}
