"""What a full disk leaves of the files that commands write: what was there before."""

import json
import resource
import socket
from pathlib import Path

import pytest
from PIL import Image

from mug.run.common import output
from mug.run.reporting.markdown_tables import write_section
from mug.run.reporting.records import add_record, read_results
from mug.run.state import checkpoint
from mug.run.training.node_checks import _checkpoint_bytes

LIMIT = 1000  # bytes of a file


@pytest.fixture
def little_room():
    """A limit on the size of files, which stops a write in the middle as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


LONG = "x" * 3 * LIMIT
WRITERS = {
    "page": lambda path: output.write_whole(path, LONG),
    "picture": lambda path: output.write_png(path, Image.effect_noise((64, 64), 50)),
    "section": lambda path: write_section(path, "Results", LONG),
    "line": lambda path: output.append_line(path, LONG),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("before", [None, "what was there\n"])
def test_nothing_is_cut(tmp_path, little_room, kind, before):
    path = tmp_path / "file"
    if before:
        path.write_text(before)
    with pytest.raises(OSError, match="File too large"):
        WRITERS[kind](path)
    left = {one.name: one.read_text() for one in tmp_path.iterdir()}
    assert left in ([{"file": before}] if before else [{}, {"file": ""}])


def test_a_result_after_one_that_did_not_fit_is_read(tmp_path, little_room):
    with pytest.raises(OSError, match="File too large"):
        add_record(tmp_path / "results.jsonl", {"method": LONG})
    add_record(tmp_path / "results.jsonl", {"method": "kNN", "data": "a\udcff"})
    assert read_results(tmp_path) == [{"method": "kNN", "data": "a\udcff"}]


def test_a_link_and_a_device_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    output.write_whole(tmp_path / "link", "×")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text(encoding="utf-8") == "×"
    output.write_whole(Path("/dev/null"), "x")
    assert not Path("/dev/null").is_file()


def test_a_save_that_did_not_end_leaves_no_room_wanting(tmp_path):
    """The next start removes it, and counts its room as free."""
    partial = checkpoint.open_partial(tmp_path, 4)
    (partial / "weight").write_bytes(bytes(5000))
    assert _checkpoint_bytes(tmp_path) == 5000
    warned = []
    assert checkpoint.resume(tmp_path, warned.append) is None
    assert warned == [f"removed {partial}, left by a save that did not finish"] and not partial.exists()


def test_a_full_disk_does_not_keep_a_run_from_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: LONG)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        output.lock(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(output.RunError, match="another run is writing there"):
        output.lock(tmp_path / "run")


def test_lines_are_appended(tmp_path):
    for number in range(2):
        output.append_line(tmp_path / "rows", json.dumps({"number": number}))
    assert (tmp_path / "rows").read_text() == '{"number": 0}\n{"number": 1}\n'
