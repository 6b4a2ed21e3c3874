"""run/index_shards.py, started as users start it."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import run_script

from mug.data.index.index import Index

ROOT = Path(__file__).parents[2]


def index_shards(*arguments: object) -> subprocess.CompletedProcess:
    return run_script("run/index_shards.py", *arguments)


@pytest.fixture
def tars(tmp_path) -> Path:
    """Two shards of three pairs, as img2dataset writes them."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as archive:
            for i in range(3):
                for extension in ("jpg", "txt", "json"):
                    info = tarfile.TarInfo(f"{shard:05d}{i:04d}.{extension}")
                    info.size, info.mtime = 700, 0.5
                    archive.addfile(info, io.BytesIO(bytes(700)))
        (tmp_path / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 4, "successes": 3}))
    return tmp_path


def test_indexes_and_keeps_what_it_has(tars):
    first = index_shards(f"{tars}/*.tar", "--out", tars / "index", "--workers", "1")
    assert (first.returncode, first.stderr) == (0, "")
    index = Index.open(tars / "index")
    assert index.counts_S.tolist() == [3, 3]
    assert "shard 2  of 2, 6 samples" in first.stdout
    assert [line.split()[1::2] for line in first.stdout.splitlines() if line.startswith("│ tar")] == [
        ["tar", "2", "0", "6", "0", "0", "0.00"]
    ]
    assert index.fingerprint[:16] in first.stdout
    again = index_shards(f"{tars}/00000.tar", f"{tars}/00001.tar", "--out", tars / "index")
    assert "0 samples indexed" in again.stdout and index.fingerprint[:16] in again.stdout


def test_a_cut_shard_is_named_with_status_2(tars):
    whole = (tars / "00000.tar").read_bytes()
    (tars / "00000.tar").write_bytes(whole[: len(whole) // 2])
    (tars / "00001_stats.json").write_text('{"successes": 4}')
    result = index_shards(f"{tars}/*.tar", "--out", tars / "index")
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"error: shard '{tars}/00000.tar' is cut short")
    assert lines[1] == f"error: shard '{tars}/00001.tar' holds 3 samples, but 00001_stats.json has 4: fetch both again"
    assert lines[2:] == ["error: 2 of 2 shards cannot be used, so the index is incomplete"]
    assert not (tars / "index" / "manifest.arrow").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["none.tar", "--out", "index"], "missing shards"),
        (["pipe:touch ran", "--out", "index"], "give paths, or URLs of"),
        (["00000.tar", "--out", "."], "holds other files than an index"),
        (["00000.tar", "--out", "index", "--workers", "0"], "--workers must be at least 1"),
        (["00000.tar"], "out"),
        (["00000.tar", "--out", "index", "--worker", "1"], "--worker"),
    ],
)
def test_user_errors_are_one_line_with_status_2(tars, arguments, reason):
    arguments = [str(tars / a) if a in (".", "index", "00000.tar") else a for a in arguments]
    result = index_shards(*arguments)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and reason in result.stderr
    assert not (ROOT / "ran").exists()


def test_captions_that_are_missing_or_chosen_are_reported(tmp_path):
    table = pa.table({"jpg": [b"x"] * 4, "TEXT": ["a", "b", "c", None], "prompt": ["d"] * 4, "blurb": ["e"] * 4})
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.select(["jpg", "blurb"]), tmp_path / "b.parquet")
    chosen = index_shards(tmp_path / "a.parquet", "--out", tmp_path / "a")
    assert chosen.returncode == 0, chosen.stderr
    assert "captions are taken from column 'TEXT', not 'prompt'; choose another by --caption" in chosen.stdout
    assert "warning" not in chosen.stdout
    missing = index_shards(tmp_path / "b.parquet", "--out", tmp_path / "b")
    assert (
        "none of 4 samples read have a caption; the shards have columns jpg (binary), blurb (string)" in missing.stdout
    )
    named = index_shards(tmp_path / "b.parquet", "--out", tmp_path / "b", "--caption", "blurb")
    assert named.returncode == 0 and "warning" not in named.stdout
