"""Building, opening and rebuilding an index of small shards."""

import functools
import http.server
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from mug.data.builders.writers import write_tar
from mug.data.config import DataConfig
from mug.data.errors import DataError
from mug.data.index import build
from mug.data.index import tar_samples as samples
from mug.data.index.build import build_index, index_for
from mug.data.index.index import Index
from mug.data.reader import Reader
from mug.data.store.expand import expand


def names(patterns) -> list[str]:
    return [Path(path).name for path in expand(patterns)]


@pytest.fixture
def folder(tmp_path):
    for name in ["a-00.tar", "a-01.tar", "a-02.tar", "b.tar"]:
        write_tar(tmp_path / name, [("k.png", b"image"), ("k.txt", b"text")])
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-*.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]),
        ("a-{00..02}.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]),
        ("a-0{2..2}.tar", ["a-02.tar"]),
        ("{b,a-01}.tar", ["b.tar", "a-01.tar"]),
        ("b.tar,FOLDER/a-{00,02}.tar", ["b.tar", "a-00.tar", "a-02.tar"]),
        ("b.tar  FOLDER/a-*.tar\n", ["b.tar", "a-00.tar", "a-01.tar", "a-02.tar"]),
        ("a-0{0..1}.{tar,tar}", ["a-00.tar", "a-00.tar", "a-01.tar", "a-01.tar"]),
    ],
)
def test_expand(folder, pattern, expected):
    assert names(f"{folder}/{pattern.replace('FOLDER', str(folder))}") == expected


def test_expand_gives_absolute_paths_and_takes_names_with_spaces_one_by_one(folder, monkeypatch):
    write_tar(folder / "a, b.tar", [("k.png", b"image")])
    monkeypatch.chdir(folder)
    assert expand(["a, b.tar", "b.tar"]) == [str(folder / "a, b.tar"), str(folder / "b.tar")]


def test_expand_urls():
    assert expand("s3://bucket/{00..01}.tar,https://host/a.tar?b") == [
        "s3://bucket/00.tar",
        "s3://bucket/01.tar",
        "https://host/a.tar?b",
    ]
    store = fsspec.filesystem("memory")
    store.pipe({"/expand/1.tar": b"", "/expand/0.tar": b""})
    assert expand("memory://expand/*.tar") == ["memory:///expand/0.tar", "memory:///expand/1.tar"]
    with pytest.raises(DataError, match="missing shards"):
        expand("memory://expand/*.parquet")


@pytest.mark.parametrize("pattern", ["none-*.tar", "a-{00..03}.tar", "a-{00..02.tar", "nothing.tar", ""])
def test_missing_shards_are_named(folder, pattern):
    with pytest.raises(DataError, match="missing shards"):
        expand(f"{folder}/{pattern}")


@pytest.mark.parametrize(
    "pattern",
    ["pipe:touch FILE", "pipe:touch${IFS}FILE", "ftp://host/a.tar", "simplecache::s3://b/a.tar", "file:///FILE"],
)
def test_other_schemes_are_refused(tmp_path, pattern):
    with pytest.raises(DataError, match=r"give paths, or URLs|missing shards"):
        expand(pattern.replace("FILE", str(tmp_path / "ran")))
    assert not (tmp_path / "ran").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_file(folder: Path, shard: int) -> Path:
    """The file that holds the rows of a shard."""
    return folder / Index.open(folder).files[shard]


def built(urls, out: Path, workers: int = 0) -> Index:
    shards = build_index([str(url) for url in urls], out, workers)
    assert [shard.failure for shard in shards] == [""] * len(urls)
    return Index.open(out)


def test_the_index_of_tars(tmp_path, make_shards):
    paths = make_shards(tmp_path / "tars", [3, 4, 1])
    index = built(paths, tmp_path / "index")
    assert (len(index), index.counts_S.tolist(), index.starts_S1.tolist()) == (8, [3, 4, 1], [0, 3, 7, 8])
    assert (index.urls, index.formats, index.etags) == ([str(path) for path in paths], ["tar"] * 3, [""] * 3)
    assert index.sizes.tolist() == [path.stat().st_size for path in paths]
    oracle = iter(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    for shard, path in enumerate(paths):
        rows, data = index.rows(shard), path.read_bytes()
        for row in range(len(rows)):
            sample = next(oracle)
            assert index.name(shard, row) == f"shard '{path}', key '{sample['__key__']}'"
            begin = rows.image_offset[row]
            assert data[begin : begin + rows.image_length[row]] == sample["png"]
            begin = rows.text_offset[row]
            assert data[begin : begin + rows.text_length[row]] == sample["txt"]
            assert rows.json_length[row] == -1
    assert next(oracle, None) is None


def test_columns_are_views_of_the_file_and_their_types_are_as_stated(tmp_path, make_shards):
    index = built(make_shards(tmp_path / "tars", [5]), tmp_path / "index")
    rows = index.rows(0)
    types = {name: str(column.dtype) for name, column in vars(rows).items() if name != "keys"}
    assert list(types.values()) == ["int64"] * 6
    assert not any(column.flags.owndata for name, column in vars(rows).items() if name != "keys")
    assert index.rows(0) is rows


def test_an_index_pickles_small(tmp_path, make_shards):
    index = built(make_shards(tmp_path / "tars", [5, 6]), tmp_path / "index")
    index.rows(0)
    data = pickle.dumps(index)
    assert len(data) < 500
    again = pickle.loads(data)
    assert again.fingerprint == index.fingerprint and again.name(1, 5) == index.name(1, 5)


def test_the_fingerprint_follows_content_not_place(tmp_path, make_shards):
    def fingerprint(name, counts, prefix="train"):
        return built(make_shards(tmp_path / name, counts, prefix), tmp_path / f"index {name}").fingerprint

    base = fingerprint("a", [3, 4])
    assert fingerprint("b", [3, 4]) == base
    others = [fingerprint("c", [4, 3]), fingerprint("d", [3, 5]), fingerprint("e", [3, 4], "other")]
    assert len({base, *others}) == 4


def test_processes_build_what_one_does(tmp_path, make_shards):
    paths = make_shards(tmp_path / "tars", [2] * 40)
    built(paths, tmp_path / "one")
    built(paths, tmp_path / "several", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "several")


SLOW_BUILD = """
import sys, time
from pathlib import Path
from mug.data.index.build import build_index
build_index(sys.argv[2:], Path(sys.argv[1]), 2, lambda done, shard: (print(done, flush=True), time.sleep(0.05)))
"""


def slow_build(tmp_path: Path, paths: list[Path]) -> subprocess.Popen:
    script = tmp_path / "slow_build.py"
    body = "\n    ".join(SLOW_BUILD.strip().splitlines())
    script.write_text(f'if __name__ == "__main__":\n    {body}\n')
    return subprocess.Popen([sys.executable, script, tmp_path / "index", *paths], stdout=subprocess.PIPE, text=True)


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path, make_shards):
    paths = make_shards(tmp_path / "tars", [2] * 48)
    built(paths, tmp_path / "whole")
    process = slow_build(tmp_path, paths)
    for line in process.stdout:
        if int(line) == 5:
            break
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the process that was killed"
        time.sleep(0.05)
    with pytest.raises(DataError, match="no finished index"):
        Index.open(tmp_path / "index")
    (tmp_path / "index" / "00003.4711.tmp").write_bytes(b"half")  # what a kill within a write leaves
    done = [path.name for path in (tmp_path / "index").glob("*.arrow")]
    assert len(done) >= 5
    shards = build_index([str(path) for path in paths], tmp_path / "index", 0)
    assert sum(shard.reused for shard in shards) == len(done)
    assert contents(tmp_path / "index") == contents(tmp_path / "whole")


def test_only_what_changed_is_scanned_again(tmp_path, make_shards):
    paths = make_shards(tmp_path / "tars", [2] * 4)
    before = built(paths, tmp_path / "index").fingerprint
    write_tar(paths[2], [("new.png", b"image")])
    os.truncate(rows_file(tmp_path / "index", 1), 100)
    shards = build_index([str(path) for path in paths], tmp_path / "index", 0)
    assert [shard.reused for shard in shards] == [True, False, False, True]
    assert Index.open(tmp_path / "index").counts_S.tolist() == [2, 2, 1, 2]
    assert Index.open(tmp_path / "index").fingerprint != before
    built(paths[:2], tmp_path / "index")
    found = [name[:5] for name in sorted(contents(tmp_path / "index"))]
    assert found == ["00000", "00001", "index", "manif"]  # what no manifest names is gone


def test_a_folder_with_other_files_is_left_alone(tmp_path, make_shards):
    (path,) = make_shards(tmp_path / "shards", [2])
    (tmp_path / "shards" / "00000.arrow").write_bytes(b"a shard of the user's")
    with pytest.raises(DataError, match="holds other files"):
        build_index([str(path)], tmp_path / "shards", 0)
    assert (tmp_path / "shards" / "00000.arrow").read_bytes() == b"a shard of the user's"


def test_shards_without_any_sample_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.txt", b""), ("2.cls", b"x")])
    with pytest.raises(DataError, match=r"no images or texts in 1 shards, '.*a\.tar' the first, which has files .txt"):
        build_index([str(tmp_path / "a.tar")], tmp_path / "index", 0)


@pytest.mark.parametrize("kind", ["tar", "arrow", "parquet"])
def test_shards_of_texts_are_indexed_and_read_where_no_image_is_needed(tmp_path, kind):
    texts = [("a", b"one barn", b""), ("b", b"", b'{"captions": {"de": "Scheune"}}'), ("c", b"", b"")]
    path = str(tmp_path / f"texts.{kind}")
    if kind == "tar":
        files = [(f"{k}.{e}", data) for k, *both in texts for e, data in zip(("txt", "json"), both, strict=True)]
        write_tar(Path(path), [(name, data) for name, data in files if data or name == "c.txt"])
    else:
        table = pa.Table.from_pylist([{"key": key, "text": text, "json": meta} for key, text, meta in texts])
        with pa.ipc.new_file(path, table.schema) if kind == "arrow" else pq.ParquetWriter(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=rf"no images in 1 shards, '.*texts\.{kind}' the first, which has .*t"):
        index_for(path, tmp_path / "cache")
    reader = Reader.open(path, DataConfig(cache=str(tmp_path / "cache")), images_needed=False)
    assert [reader.index.key(0, row) for row in range(len(reader.index))] == ["a", "b"]
    assert [reader.read(0, row) for row in range(2)] == [(b"", text, json) for _, text, json in texts[:2]]
    left_out = {"keys without a text" if kind == "tar" else "rows without a text": [1, "'c'"]}
    (shard,) = build_index([path], tmp_path / "index", 0)
    assert shard.texts and {kind: [*one] for kind, one in shard.left_out.kinds.items()} == left_out
    assert build_index([path], tmp_path / "index", 0)[0].reused


def test_a_damaged_shard_is_named_and_the_others_are_indexed(tmp_path, make_shards):
    paths = make_shards(tmp_path / "tars", [2, 3, 2])
    whole = paths[1].read_bytes()
    for data, reason in [(whole[:2000], "is cut short inside '"), (b"", "is empty"), (b"PK" * 999, "is not a tar")]:
        paths[1].write_bytes(data)
        shards = build_index([str(path) for path in paths], tmp_path / "index", 0)
        assert [bool(shard.failure) for shard in shards] == [False, True, False]
        assert shards[1].failure.startswith(f"shard '{paths[1]}' {reason}")
        with pytest.raises(DataError, match="no finished index"):
            Index.open(tmp_path / "index")
    paths[1].write_bytes(whole)
    shards = build_index([str(path) for path in paths], tmp_path / "index", 0)
    assert [shard.reused for shard in shards] == [True, False, True]
    assert len(Index.open(tmp_path / "index")) == 7


@pytest.mark.parametrize(
    ("stats", "reason"),
    [
        ({"successes": 3, "count": 10}, ""),
        ({"successes": 4}, "holds 3 samples, but train-00000_stats.json has 4"),
        ({}, "damaged train-00000_stats.json"),
    ],
)
def test_counts_are_checked_against_img2dataset(tmp_path, make_shards, stats, reason):
    (path,) = make_shards(tmp_path / "tars", [3])
    (tmp_path / "tars" / "train-00000_stats.json").write_text(json.dumps(stats))
    (shard,) = build_index([str(path)], tmp_path / "index", 0)
    assert bool(shard.failure) == bool(reason) and reason in shard.failure


def test_every_format_in_one_index(tmp_path, make_shards):
    (path,) = make_shards(tmp_path / "shards", [3])
    table = pa.table({"jpg": [b"1", b"22"], "caption": ["a", "b"]})
    pq.write_table(table, tmp_path / "shards" / "a.parquet")
    with pa.ipc.new_file(tmp_path / "shards" / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    index = built([path, *(tmp_path / "shards" / name for name in ("a.parquet", "b.arrow"))], tmp_path / "index")
    assert index.formats == ["tar", "parquet", "arrow"]
    assert index.counts_S.tolist() == [3, 2, 2]
    assert index.rows(1).image_length.tolist() == [0, 1]
    data = (tmp_path / "shards" / "b.arrow").read_bytes()
    rows = index.rows(2)
    assert data[rows.image_offset[1] :][: rows.image_length[1]] == b"22"


@pytest.mark.parametrize("damage", ["cut", "noise", "other build", "gone", "version"])
def test_damaged_indexes_are_refused(tmp_path, make_shards, damage):
    paths = make_shards(tmp_path / "tars", [3, 3])
    index = tmp_path / "index"
    built(paths, index)
    if damage == "cut":
        os.truncate(index / "manifest.arrow", 300)
    elif damage == "noise":
        (index / "manifest.arrow").write_bytes(b"noise" * 100)
    elif damage == "other build":
        shutil.copy(rows_file(index, 1), rows_file(index, 0))
    elif damage == "gone":
        rows_file(index, 0).unlink()
    else:
        data = (index / "manifest.arrow").read_bytes()
        with pa.ipc.open_file(index / "manifest.arrow") as file:
            batch = file.get_batch(0)
        changed = batch.replace_schema_metadata({**batch.schema.metadata, b"version": b"0"})
        with pa.ipc.new_file(index / "manifest.arrow", changed.schema) as writer:
            writer.write_batch(changed)
        assert data != (index / "manifest.arrow").read_bytes()
    with pytest.raises(DataError, match=re.escape(str(index))):
        Index.open(index).rows(0)


def test_index_for_builds_once_and_again_when_a_shard_changes(tmp_path, make_shards, monkeypatch):
    paths = make_shards(tmp_path / "tars", [3, 4])
    scans = []
    monkeypatch.setattr(build, "index_shard", lambda *a, f=build.index_shard: scans.append(a) or f(*a))
    first = index_for(f"{tmp_path}/tars/*.tar", tmp_path / "cache")
    assert len(index_for(f"{tmp_path}/tars/*.tar", tmp_path / "cache")) == len(first) == 7
    assert len(scans) == 2
    assert first.folder.parent == tmp_path / "cache" / "index"
    opened = index_for(str(first.folder), tmp_path / "nowhere")
    assert opened.fingerprint == first.fingerprint and not (tmp_path / "nowhere").exists()
    write_tar(paths[0], [("new.png", b"image")])
    assert index_for(f"{tmp_path}/tars/*.tar", tmp_path / "cache").counts_S.tolist() == [1, 4]
    paths[0].write_bytes(b"")
    with pytest.raises(DataError, match=r"train-00000\.tar' is empty"):
        index_for(f"{tmp_path}/tars/*.tar", tmp_path / "cache")


def test_index_for_from_several_processes(tmp_path, make_shards):
    make_shards(tmp_path / "tars", [3, 4, 5])
    script = "import sys; from pathlib import Path; from mug.data.index.build import index_for\n"
    script += "print(index_for(sys.argv[1], Path(sys.argv[2])).fingerprint)"
    command = [sys.executable, "-c", script, f"{tmp_path}/tars/*.tar", tmp_path / "cache"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    fingerprints = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert fingerprints == [built(sorted((tmp_path / "tars").iterdir()), tmp_path / "alone").fingerprint + "\n"] * 3
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 1


def remote_index(urls: list[str], local: list[Path], tmp_path: Path) -> Index:
    """The index of shards elsewhere, which must be that of the same shards here."""
    index, here = built(urls, tmp_path / "there"), built(local, tmp_path / "here")
    assert index.fingerprint == here.fingerprint and index.urls == urls
    assert all(index.rows(i).keys.equals(here.rows(i).keys) for i in range(len(urls)))
    assert not list((tmp_path / "there").glob("*.tmp"))
    return index


@pytest.fixture
def mixed_shards(tmp_path, make_shards) -> list[Path]:
    """A tar with bodies of more than a window, a small tar, and an Arrow file."""
    paths = make_shards(tmp_path / "shards", [5])
    write_tar(tmp_path / "shards" / "big.tar", [(f"{i}.jpg", bytes([i]) * 50_000) for i in range(6)])
    table = pa.table({"jpg": [b"1", b"22"], "caption": ["a", "b"]})
    with pa.ipc.new_file(tmp_path / "shards" / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    return [*paths, tmp_path / "shards" / "big.tar", tmp_path / "shards" / "b.arrow"]


@pytest.mark.parametrize("window", [2**12, 2**23])
def test_shards_in_a_store(tmp_path, mixed_shards, monkeypatch, window):
    monkeypatch.setattr(build, "REMOTE_WINDOW", window)
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pipe({f"/there/{path.name}": path.read_bytes() for path in mixed_shards})
    remote_index([f"memory://there/{path.name}" for path in mixed_shards], mixed_shards, tmp_path)
    store.pipe("/there/big_stats.json", b'{"successes": 7}')
    (shard,) = build_index(["memory://there/big.tar"], tmp_path / "other", 0)
    assert shard.failure == "shard 'memory://there/big.tar' holds 6 samples, but big_stats.json has 7: fetch both again"
    (shard,) = build_index(["memory://there/none.tar"], tmp_path / "none", 0)
    assert "'memory://there/none.tar' does not exist" in shard.failure


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves files, by ranges where `ranges` is set, with ETags; counts the bytes it sends."""

    ranges = True
    sent = 0

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        self.answer(None)

    def answer(self, body: bytes | None) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        part = data[int(asked[1]) : int(asked[2]) + 1] if asked and self.ranges else data
        self.send_response(206 if asked and self.ranges else 200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
            if asked:
                self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{len(data)}"')
        self.end_headers()
        if body is None:
            self.wfile.write(part)
            Server.sent += len(part)


@pytest.mark.parametrize("ranges", [True, False])
def test_shards_on_a_web_server(tmp_path, mixed_shards, monkeypatch, ranges):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(build, "REMOTE_WINDOW", 2**12)
    monkeypatch.setattr(Server, "ranges", ranges)
    monkeypatch.setattr(Server, "sent", 0)
    handler = functools.partial(Server, directory=str(tmp_path / "shards"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_address[1]}"
        index = remote_index([f"{host}/{path.name}" for path in mixed_shards], mixed_shards, tmp_path)
        (shard,) = build_index([f"{host}/none.tar?token=secret"], tmp_path / "none", 0)
        server.shutdown()
    assert index.etags == [f'"{path.stat().st_size}"' for path in mixed_shards]
    assert "none.tar" in shard.failure and "secret" not in shard.failure
    whole = sum(path.stat().st_size for path in mixed_shards)
    assert Server.sent < 0.5 * whole if ranges else Server.sent >= whole  # bodies are skipped


def test_open_rows_hold_no_open_file(tmp_path, make_shards):
    paths = make_shards(tmp_path / "tars", [1] * 30)
    index = built(paths, tmp_path / "index")
    before = len(os.listdir("/proc/self/fd"))
    assert np.concatenate([index.rows(shard).image_length for shard in range(30)]).min() > 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_scan_does_not_depend_on_its_window(tmp_path, make_shards):
    (path,) = make_shards(tmp_path, [30])
    data = path.read_bytes()
    scans = [samples.scan_tar(lambda o, n: data[o : o + n], len(data), window) for window in (1536, 4096, 2**23)]
    assert scans[0].rows.equals(scans[1].rows) and scans[0].rows.equals(scans[2].rows)


@pytest.mark.parametrize(
    "name", ["my photos", "a,b", "a, b", "set [1]", "b\u00e4ume \u6811", "50%", "what?", "end ", "*[x], y"]
)
def test_folders_with_spaces_and_signs_in_their_names(tmp_path, make_shards, name):
    make_shards(tmp_path / name, [1, 1, 1])
    names = [f"train-{i:05d}.tar" for i in range(3)]
    for end in ("train-*.tar", "train-{00000..00002}.tar", "train-00000.tar"):
        count = 1 if end == "train-00000.tar" else 3
        assert expand(f"{tmp_path}/{name}/{end}") == [f"{tmp_path}/{name}/{n}" for n in names[:count]]


def test_two_long_ranges_are_not_multiplied(tmp_path, make_shards):
    make_shards(tmp_path / "a b", [1])
    start = time.monotonic()
    with pytest.raises(DataError, match="paths with spaces or commas are given alone"):
        expand(f"{tmp_path}/a b/{{0000..9999}}.tar {tmp_path}/{{0000..9999}}.tar")
    assert time.monotonic() - start < 1
