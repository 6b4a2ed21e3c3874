"""A checkpoint that cannot be read may be whole: nothing takes its place, and nothing removes it."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mug.run.common.errors import RunError
from mug.run.state import checkpoint
from mug.run.state.replay_bundle import Bundle
from mug.run.state.replay_bundle import write as write_bundle

FILE = "weight.safetensors"


def save(output: Path, step: int, keep: int = 2) -> Path:
    partial = checkpoint.open_partial(output, step)
    (partial / FILE).write_bytes(b"weights of %d" % step)
    checkpoint.commit(output, step, {FILE: checkpoint.checksum(partial / FILE)}, {}, {}, keep)
    return output / f"checkpoint-{step}"


def contents(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run's folder with two checkpoints."""
    monkeypatch.setattr(checkpoint, "PAUSES", (0.0, 0.0), raising=False)
    save(tmp_path, 2)
    save(tmp_path, 4)
    return tmp_path


def failing(monkeypatch, victim: Path, number: int, times: int) -> None:
    """Opening `victim` fails with an error of this number, so many times."""
    real, left = os.open, [times]

    def opens(path, *arguments, **more):
        if Path(path) == victim and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(checkpoint.Path, "open", lambda path, mode="r", *a, **k: _open(opens, path, mode, **k))
    monkeypatch.setattr(
        checkpoint.Path, "read_text", lambda path, encoding: _open(opens, path, "r", encoding=encoding).read()
    )


def _open(opens, path, mode, **more):
    return open(path, mode, opener=lambda name, flags: opens(path, flags), **more)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", [checkpoint.MANIFEST, FILE])
def test_it_is_refused_by_name_and_stays(run, monkeypatch, number, name):
    before = contents(run)
    victim = run / "checkpoint-4" / name
    failing(monkeypatch, victim, number, times=99)
    with pytest.raises(RunError) as refused:
        checkpoint.resume(run, pytest.fail)
    assert str(refused.value).startswith(f"{victim} cannot be read ({os.strerror(number)})")
    monkeypatch.undo()
    assert contents(run) == before
    assert checkpoint.newest(run, pytest.fail).step == 4


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
def test_a_moment_without_an_answer_is_waited_for(run, monkeypatch, number):
    failing(monkeypatch, run / "checkpoint-4" / FILE, number, times=2)
    assert checkpoint.resume(run, pytest.fail).step == 4


def test_another_format_is_of_another_version_and_stays(run):
    path = run / "checkpoint-4" / checkpoint.MANIFEST
    for format, remedy in (
        (4, "use the version of this program that wrote it"),
        (2, "convert it: python run/convert_checkpoint.py"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": format}))
        with pytest.raises(RunError, match=rf"has format {format}, not 3; {remedy}"):
            checkpoint.resume(run, pytest.fail)
    assert (run / "checkpoint-4").is_dir()


def test_a_link_that_leads_nowhere_is_not_passed_over(run):
    """The storage that an old checkpoint was moved to is not mounted."""
    shutil.move(run / "checkpoint-4", run / "elsewhere")
    (run / "checkpoint-4").symlink_to(run / "elsewhere")
    assert checkpoint.newest(run, pytest.fail).step == 4
    (run / "elsewhere").rename(run / "away")
    with pytest.raises(RunError, match=r"checkpoint-4\S* cannot be read"):
        checkpoint.resume(run, pytest.fail)
    (run / "away").rename(run / "elsewhere")
    assert checkpoint.newest(run, pytest.fail).step == 4


def test_what_is_damaged_is_set_aside_and_not_removed(run):
    for number in (1, 2):
        save(run, 4 + number, keep=9)
        (run / f"checkpoint-{4 + number}" / FILE).write_bytes(b"weights of 9")
    warned = []
    assert checkpoint.resume(run, warned.append).step == 4
    assert len(warned) == 4 and "checkpoint-6 to checkpoint-6.damaged" in warned[2]
    save(run, 6, keep=9)
    assert (run / "checkpoint-6.damaged" / FILE).read_bytes() == b"weights of 9"
    (run / "checkpoint-6" / FILE).write_bytes(b"weights of 8")
    checkpoint.resume(run, warned.append)
    assert (run / "checkpoint-6.damaged.2" / FILE).read_bytes() == b"weights of 8"


def test_nothing_is_pruned_while_a_replay_bundle_cannot_be_read(run, monkeypatch):
    bundle = write_bundle(run, Bundle(3, "checkpoint-2", "x.json", 1, 0, {}, [], {}))
    failing(monkeypatch, bundle, errno.EIO, times=99)
    save(run, 6, keep=1)
    assert [folder.name for folder in checkpoint.list_folders(run)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    monkeypatch.undo()
    save(run, 8, keep=1)
    assert [folder.name for folder in checkpoint.list_folders(run)] == ["checkpoint-8", "checkpoint-2"]


RESUME = """
import sys
from pathlib import Path
from mug.run.state import checkpoint
from mug.run.common.console import run_command
checkpoint.PAUSES = (0.0,)
run_command(lambda console: console.info(f"step {checkpoint.resume(Path(sys.argv[1]), console.warn).step}"))
"""
# Root that may not pass over the rights of files.
AS_ANOTHER_USER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
@pytest.mark.parametrize("victim", [".", "checkpoint-4", f"checkpoint-4/{FILE}", f"checkpoint-4/{checkpoint.MANIFEST}"])
def test_another_users_checkpoint_is_one_line(run, victim):
    before = contents(run)
    os.chown(run / victim, 65534, 65534)
    (run / victim).chmod(0o700)
    command = [*AS_ANOTHER_USER, sys.executable, "-c", RESUME, str(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "", done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {run}") and "cannot be read (Permission denied)" in line
    assert contents(run) == before
