"""Local shards, the cache and ranged reads, against files in memory and a plain HTTP server on loopback."""

import errno
import fcntl
import hashlib
import logging
import multiprocessing
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from faulty_server import Server, broken, etag, files, short, status

from mug.data.errors import DataError
from mug.data.store import disk_cache as cache_module
from mug.data.store import fetch as fetch_module
from mug.data.store import remote
from mug.data.store.disk_cache import PART, DiskCache
from mug.data.store.fetch import Fetch, FetchConfig
from mug.data.store.remote import Shard

SIZE = 100_000


def contents(shard: int, size: int = SIZE) -> bytes:
    return np.random.default_rng(shard).bytes(size)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small pieces, short pauses."""
    monkeypatch.setattr(fetch_module, "PIECE", 30_000)
    monkeypatch.setattr(fetch_module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(remote, "READ_SECONDS", 0.5)
    monkeypatch.setattr(fetch_module, "GRACE_SECONDS", 2.0)
    monkeypatch.setattr(cache_module, "TOUCH_SECONDS", -1.0)


@pytest.fixture
def server():
    with Server(files({f"/{shard}.tar": contents(shard) for shard in range(8)})) as server:
        yield server


def remote_fetch(server: Server, folder: Path | None, shards: int = 8, etags: str = "", **config) -> Fetch:
    urls = [f"{server.url}/{shard}.tar" for shard in range(shards)]
    return Fetch(urls, [SIZE] * shards, [etags] * shards, folder, FetchConfig(**{"retry_seconds": 5.0} | config))


def gigabytes(shards: float) -> float:
    return shards * SIZE / 1e9


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def eventually(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    "wrong", [{"remote": "copy"}, {"cache_gb": 0}, {"cache_gb": float("nan")}, {"prefetch": -1}, {"retry_seconds": -1}]
)
def test_a_wrong_setting_is_named(wrong):
    with pytest.raises(DataError, match=rf"^data\.{next(iter(wrong))} is [^\n]*: give [^\n]*$"):
        FetchConfig(**wrong)


# Local shards


def local_fetch(folder: Path, count: int = 3) -> Fetch:
    for shard in range(count):
        (folder / f"{shard}.tar").write_bytes(contents(shard))
    return Fetch(
        [str(folder / f"{shard}.tar") for shard in range(count)], [SIZE] * count, [""] * count, None, FetchConfig()
    )


def test_local_reads_are_slices_of_the_files(tmp_path):
    fetch = local_fetch(tmp_path)
    random = np.random.default_rng(0)
    for _ in range(200):
        shard, offset = random.integers(3).item(), random.integers(SIZE).item()
        length = random.integers(SIZE - offset + 1).item()
        assert fetch.read(shard, offset, length) == contents(shard)[offset : offset + length]
    assert fetch.local(1).read_bytes() == contents(1)
    fetch.prefetch([0, 1, 2])  # nothing to do, no cache folder needed


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_a_local_shard_of_another_size_is_named_when_opened(tmp_path, size):
    fetch = local_fetch(tmp_path)
    (tmp_path / "1.tar").write_bytes(bytes(size))
    for _ in range(2):
        with pytest.raises(DataError, match=rf"1\.tar'.* has {size:,} bytes, but 100,000 in the index.*index_shards"):
            fetch.read(1, 0, 0)
    assert fetch.read(0, 1, 2) == contents(0)[1:3]


def test_a_local_shard_that_shrinks_later_is_named(tmp_path):
    fetch = local_fetch(tmp_path)
    assert fetch.read(1, SIZE - 1, 1) == contents(1)[-1:]
    os.truncate(tmp_path / "1.tar", 10)
    with pytest.raises(DataError, match=r"1\.tar'.*has 10 bytes, but 100,000 in the index.*index_shards"):
        fetch.read(1, SIZE - 1, 1)


def test_a_missing_or_forbidden_local_shard_is_named_at_once(tmp_path):
    fetch = local_fetch(tmp_path)
    (tmp_path / "1.tar").unlink()
    with pytest.raises(DataError, match=r"^shard '.*/1\.tar' does not exist: .*$"):
        fetch.read(1, 0, 1)
    (tmp_path / "2.tar").chmod(0)
    if os.geteuid():  # root may read all
        with pytest.raises(DataError, match=r"^shard '.*/2\.tar': access is denied.*$"):
            fetch.read(2, 0, 1)


def test_a_stale_handle_is_opened_again(tmp_path, monkeypatch, caplog):
    fetch = local_fetch(tmp_path)
    fetch.read(0, 0, 1)
    pread, failures = os.pread, [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "I/O error")]

    def failing(*arguments):
        if failures:
            raise failures.pop()
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", failing)
    assert fetch.read(0, 5, 10) == contents(0)[5:15]
    assert not failures
    assert len(caplog.records) == 1  # one warning a minute
    assert "0.tar" in caplog.text


def test_few_local_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_module, "OPEN_LOCAL", 4)
    fetch = local_fetch(tmp_path, 12)
    before = len(os.listdir("/proc/self/fd"))
    for shard in [*range(12), *range(12)]:
        assert fetch.read(shard, 7, 9) == contents(shard)[7:16]
    assert len(os.listdir("/proc/self/fd")) == before + 4
    del fetch
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_share_the_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_module, "OPEN_LOCAL", 2)
    fetch = local_fetch(tmp_path, 6)
    wrong = []

    def read(seed):
        for shard in np.random.default_rng(seed).integers(6, size=300).tolist():
            if fetch.read(shard, 100, 50) != contents(shard)[100:150]:
                wrong.append(shard)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert not wrong


# The cache


def test_a_remote_shard_is_fetched_once_and_whole(server, tmp_path):
    fetch = remote_fetch(server, tmp_path)
    assert not server.requests  # lazy
    assert fetch.read(2, 99_990, 10) == contents(2)[-10:]
    assert fetch.local(2).read_bytes() == contents(2)
    assert names(tmp_path) == [fetch.local(2).name]
    pieces = [f"bytes={first}-{min(first + 30_000, SIZE) - 1}" for first in range(0, SIZE, 30_000)]
    assert server.ranges("/2.tar") == pieces
    again = remote_fetch(server, tmp_path)
    assert again.read(2, 0, SIZE) == contents(2)
    assert server.ranges("/2.tar") == pieces


def test_another_etag_is_another_file(server, tmp_path):
    remote_fetch(server, tmp_path).read(0, 0, 1)
    with pytest.raises(DataError, match=r"0\.tar': its ETag is .*, but \"other\" in the index.*index_shards"):
        remote_fetch(server, tmp_path, etags='"other"').read(0, 0, 1)
    assert len(names(tmp_path)) == 1


def test_the_longest_unused_go_and_the_total_stays_bounded(server, tmp_path):
    fetch = remote_fetch(server, tmp_path, cache_gb=gigabytes(3.5), prefetch=0)
    for shard in (0, 1, 2, 0, 3):  # 3 takes the place of 1
        assert fetch.read(shard, 0, SIZE) == contents(shard)
        assert sum(entry.stat().st_size for entry in os.scandir(tmp_path)) <= 3.5 * SIZE
    server.requests.clear()
    for shard in (0, 2, 3):
        assert fetch.read(shard, 0, SIZE) == contents(shard)
    assert not server.requests
    assert fetch.read(1, 0, SIZE) == contents(1)
    assert server.ranges("/1.tar")


def test_shards_on_their_way_count(server, tmp_path):
    server.always["GET", "/0.tar"] = broken("stall")
    fetch = remote_fetch(server, tmp_path, cache_gb=gigabytes(2), prefetch=1, retry_seconds=60.0)
    fetch.prefetch([0])
    eventually(lambda: len(names(tmp_path)) == 1)
    for shard in (1, 2, 3):
        fetch.read(shard, 0, 1)
        assert len(names(tmp_path)) == 2  # one part, one whole
        assert names(tmp_path)[0].endswith(PART) or names(tmp_path)[1].endswith(PART)


def test_what_is_wanted_next_stays(server, tmp_path):
    fetch = remote_fetch(server, tmp_path, cache_gb=gigabytes(2), prefetch=1)
    fetch.prefetch([7, 6])  # 6 is beyond `prefetch`
    eventually(lambda: len(names(tmp_path)) == 1 and not names(tmp_path)[0].endswith(PART))
    other = remote_fetch(server, tmp_path, cache_gb=gigabytes(2), prefetch=0)
    for shard in (0, 1, 2):
        assert other.read(shard, 0, SIZE) == contents(shard)
    server.requests.clear()
    assert fetch.read(7, 0, SIZE) == contents(7)
    assert not server.requests
    fetch.prefetch([])
    other.read(3, 0, 1)
    other.read(4, 0, 1)
    fetch.read(7, 0, 1)
    assert server.ranges("/7.tar")


def test_too_small_a_cache_is_slow_but_right(server, tmp_path, caplog):
    """Each pins a shard, and together they need more than there is room for: nobody waits for the other."""
    first, second = (remote_fetch(server, tmp_path, cache_gb=gigabytes(1), prefetch=1) for _ in range(2))
    for shard in (0, 2, 4):
        first.prefetch([shard])
        second.prefetch([shard + 1])
        assert first.read(shard, 0, SIZE) == contents(shard)
        assert second.read(shard + 1, 0, SIZE) == contents(shard + 1)
    eventually(lambda: not any(name.endswith(PART) for name in names(tmp_path)))
    assert len(names(tmp_path)) == 1
    assert "too small for the shards in use" in caplog.text


def test_a_shard_larger_than_the_cache_is_named(server, tmp_path):
    with pytest.raises(DataError, match=r"0\.tar' has 0\.00 GB, more than data\.cache_gb.*raise it"):
        remote_fetch(server, tmp_path, cache_gb=gigabytes(0.9)).read(0, 0, 1)
    with pytest.raises(DataError, match=r"set data\.cache,"):
        remote_fetch(server, None).read(0, 0, 1)


def test_eviction_during_reads_changes_no_byte(server, tmp_path):
    """Three readers go over five shards in a cache of two."""
    wrong, done = [], []

    def read(seed):
        fetch = remote_fetch(server, tmp_path, cache_gb=gigabytes(2), prefetch=0, retry_seconds=30.0)
        for shard in np.random.default_rng(seed).integers(5, size=12).tolist():
            if fetch.read(shard, 0, SIZE) != contents(shard):
                wrong.append(shard)
        done.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert len(done) == 3


def test_an_evicted_file_can_be_read_on(tmp_path):
    disk = DiskCache(tmp_path, SIZE)
    old, new = (Shard(f"s3://bucket/{name}.tar", SIZE, "") for name in "ab")
    part = disk.reserve(old, force=False)
    disk.write(part, contents(0))
    held = disk.commit(old, part)
    with pytest.raises(cache_module.CacheFull):
        disk.reserve(new, force=False)
    assert disk.reserve(new, force=True) is not None
    assert disk.open(old) is None
    assert held.read(0, SIZE) == contents(0)


def test_a_damaged_cache_file_is_fetched_again(server, tmp_path):
    os.truncate(remote_fetch(server, tmp_path).local(0), 5)
    assert remote_fetch(server, tmp_path).read(0, 0, SIZE) == contents(0)


@pytest.mark.parametrize("helps", [True, False])
def test_a_full_disk_costs_old_shards_first(server, tmp_path, monkeypatch, helps):
    fetch = remote_fetch(server, tmp_path, prefetch=0)
    for shard in range(3):
        fetch.read(shard, 0, 1)
    write = os.write

    def full(number, data):
        in_cache = str(tmp_path) in os.readlink(f"/proc/self/fd/{number}")
        if in_cache and (not helps or len(names(tmp_path)) > 2):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(number, data)

    monkeypatch.setattr(os, "write", full)
    if helps:
        assert fetch.read(3, 0, SIZE) == contents(3)
        assert fetch.local(2).name in names(tmp_path)  # the youngest of the old
    else:
        with pytest.raises(DataError, match=rf"^cache folder '{tmp_path}'.*No space left.*data\.cache_gb"):
            fetch.read(3, 0, 1)
        assert not names(tmp_path)


def test_an_unusable_cache_folder_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^cache folder '.*/file/cache' cannot be used"):
        remote_fetch(server, tmp_path / "file" / "cache").read(0, 0, 1)


def test_an_error_in_the_background_reaches_its_reader_alone(server, tmp_path):
    server.always["HEAD", "/1.tar"] = server.always["GET", "/1.tar"] = status(404, "NoSuchKey")
    fetch = remote_fetch(server, tmp_path)
    fetch.prefetch([0, 1, 2])
    for shard in (0, 2):
        assert fetch.read(shard, 0, SIZE) == contents(shard)
    with pytest.raises(DataError, match=r"1\.tar' does not exist"):
        fetch.read(1, 0, 1)


def test_several_are_fetched_ahead_in_order_and_no_more(server, tmp_path):
    for shard in range(8):
        server.always["GET", f"/{shard}.tar"] = broken("stall")
    fetch = remote_fetch(server, tmp_path, prefetch=3, retry_seconds=60.0)
    fetch.prefetch([5, 4, 3, 2])
    eventually(lambda: len({path for _, path, _ in server.requests}) == 3)
    time.sleep(0.3)
    assert {path for _, path, _ in server.requests} == {"/5.tar", "/4.tar", "/3.tar"}
    server.always.clear()
    assert fetch.read(2, 0, SIZE) == contents(2)  # does not queue behind the others
    assert fetch.read(5, 0, SIZE) == contents(5)


def test_a_backend_that_hangs_does_not_hang_the_reader(server, tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(remote.Stores, "open", lambda *_, **__: release.wait(30))
    began = time.monotonic()
    with pytest.raises(DataError, match=r"0\.tar': gave up after 0\.2 s without progress"):
        remote_fetch(server, tmp_path, retry_seconds=0.2).read(0, 0, 1)
    assert time.monotonic() - began < 5
    release.set()


# Several processes

READ = """
import hashlib, sys
from pathlib import Path
from mug.data.store.fetch import Fetch, FetchConfig
url, folder, count, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
fetch = Fetch([f"{url}/{i}.tar" for i in range(count)], [size] * count, [""] * count, folder, FetchConfig())
print("ready", flush=True)
sys.stdin.readline()
"""
ALL = READ + "for i in range(count): print(hashlib.sha256(fetch.read(i, 0, size)).hexdigest(), flush=True)"
LEAVE = READ + "fetch.prefetch(range(count)); sys.stdin.readline()"


def start(script: str, server: Server, folder: Path, count: int) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", script, server.url, folder, str(count), str(SIZE)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_fetch_a_shard_once(server, tmp_path):
    for shard in range(3):  # so that the first is still at it when the others come
        server.always["GET", f"/{shard}.tar"] = lambda answer: time.sleep(0.3) or answer
    processes = [start(ALL, server, tmp_path, 3) for _ in range(4)]
    for process in processes:
        go(process)
    expected = [hashlib.sha256(contents(shard)).hexdigest() for shard in range(3)]
    for process in processes:
        assert process.communicate(timeout=60)[0].split() == expected
    for shard in range(3):
        assert server.ranges(f"/{shard}.tar") == [f"bytes=0-{SIZE - 1}"]
    assert len(names(tmp_path)) == 3


def test_what_a_killed_process_left_is_cleared_or_fetched_by_another(server, tmp_path):
    server.always["GET", "/0.tar"] = broken("stall")
    process = start(ALL, server, tmp_path, 1)
    go(process)
    eventually(lambda: len(server.ranges("/0.tar")) == 1)
    (part,) = names(tmp_path)
    assert part.endswith(PART)
    DiskCache(tmp_path, 10 * SIZE)
    assert names(tmp_path) == [part]  # it is being written
    fetch = remote_fetch(server, tmp_path, retry_seconds=60.0)
    fetch.prefetch([0])  # waits for that process
    time.sleep(0.3)
    assert len(server.ranges("/0.tar")) == 1
    server.always.clear()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert fetch.read(0, 0, SIZE) == contents(0)
    assert names(tmp_path) == [part.removesuffix(PART)]


def test_a_start_clears_what_a_crash_left(tmp_path):
    disk = DiskCache(tmp_path, 10 * SIZE)
    shards = [Shard(f"s3://bucket/{name}.tar", SIZE, "") for name in "ab"]
    parts = [disk.reserve(shard, force=False) for shard in shards]
    parts[0].lock(fcntl.LOCK_UN)
    (tmp_path / "mine.part").write_text("not a shard")
    DiskCache(tmp_path, 10 * SIZE)
    assert names(tmp_path) == sorted([disk.path(shards[1]).name + PART, "mine.part"])


def test_a_process_ends_during_a_transfer(server, tmp_path):
    for shard in range(4):
        server.always["GET", f"/{shard}.tar"] = broken("stall")
    process = start(LEAVE, server, tmp_path, 4)
    go(process)
    eventually(lambda: server.ranges("/3.tar"))
    go(process)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(server.ranges("/3.tar")) == 1


def test_pickles_small_and_works_after_a_fork(server, tmp_path):
    fetch = remote_fetch(server, tmp_path)
    blank = len(pickle.dumps(fetch))
    server.always["GET", "/1.tar"] = broken("stall")
    fetch.read(0, 0, 1)
    fetch.prefetch([1])
    eventually(lambda: server.ranges("/1.tar"))
    copy = pickle.loads(pickle.dumps(fetch))
    assert len(pickle.dumps(fetch)) == blank < 2000
    assert copy.read(0, 0, SIZE) == contents(0)

    def child(queue):
        queue.put([hashlib.sha256(fetch.read(shard, 0, SIZE)).hexdigest() for shard in (0, 2)])

    queue = multiprocessing.get_context("fork").Queue()
    process = multiprocessing.get_context("fork").Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=30) == [hashlib.sha256(contents(shard)).hexdigest() for shard in (0, 2)]
    process.join(30)
    assert process.exitcode == 0


# Faults over plain HTTP: those of S3 are in test_fetch_s3.py


@pytest.mark.parametrize("end", ["close", "reset", "stall"])
def test_a_broken_transfer_continues_where_it_was(server, tmp_path, end):
    server.faults["GET", "/0.tar"] += [lambda answer: answer, broken(end)]
    began = time.monotonic()
    assert remote_fetch(server, tmp_path).read(0, 0, SIZE) == contents(0)
    assert time.monotonic() - began < 5
    starts = [int(re.match(r"bytes=(\d+)", asked)[1]) for asked in server.ranges("/0.tar")]
    assert starts == [0, 30_000, 30_000, 60_000, 90_000]


def test_a_short_piece_is_filled_up(server, tmp_path):
    server.faults["GET", "/0.tar"] += [short, short]
    assert remote_fetch(server, tmp_path).read(0, 0, SIZE) == contents(0)
    starts = [int(re.match(r"bytes=(\d+)", asked)[1]) for asked in server.ranges("/0.tar")]
    assert starts == [0, 15_000, 30_000, 60_000, 90_000]


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, tmp_path, method, code, caplog):
    server.faults[method, "/0.tar"] += [status(code, "Busy")] * 3
    if method == "HEAD":  # fsspec then asks by GET
        server.faults["GET", "/0.tar"] += [status(code, "Busy")]
    assert remote_fetch(server, tmp_path).read(0, 0, SIZE) == contents(0)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 1


def test_retry_after_is_honoured(server, tmp_path):
    server.faults["GET", "/0.tar"] += [status(503, "Busy", **{"Retry-After": "1"})]
    began = time.monotonic()
    assert remote_fetch(server, tmp_path).read(0, 0, 5) == contents(0)[:5]
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize("ranged", [True, False])
def test_the_budget_ends_with_the_name(server, tmp_path, ranged):
    server.always["GET", "/0.tar"] = status(503, "Busy")
    fetch = remote_fetch(server, tmp_path, remote="ranged" if ranged else "cache", retry_seconds=0.5)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"^shard '.*/0\.tar': gave up after 0\.5 s .*503.*data\.retry_seconds$"):
        fetch.read(0, 0, 1)
    assert 0.4 < time.monotonic() - began < 4
    assert names(tmp_path) == []


@pytest.mark.parametrize(("code", "text"), [(404, "does not exist"), (410, "does not exist"), (403, "credentials")])
@pytest.mark.parametrize("ranged", [True, False])
def test_what_no_retry_fixes_is_reported_at_once(server, tmp_path, code, text, ranged):
    server.always["GET", "/0.tar"] = server.always["HEAD", "/0.tar"] = status(code, "No")
    fetch = remote_fetch(server, tmp_path, remote="ranged" if ranged else "cache", retry_seconds=60.0)
    began = time.monotonic()
    with pytest.raises(DataError, match=rf"^shard '.*/0\.tar'.*{text}"):
        fetch.read(0, 0, 1)
    assert time.monotonic() - began < 3
    assert len(server.requests) <= 4


@pytest.mark.parametrize("ranged", [True, False])
def test_a_shard_that_changed_is_named(server, tmp_path, ranged):
    fetch = remote_fetch(server, tmp_path, remote="ranged" if ranged else "cache")
    fetch._sizes = [SIZE + 1] * 8
    with pytest.raises(DataError, match=r"0\.tar': it has 100,000 bytes, but 100,001 in the index.*rerun index_shards"):
        fetch.read(0, 0, 1)
    assert names(tmp_path) == []


def test_a_change_during_the_transfer_is_named(server, tmp_path):
    server.faults["HEAD", "/0.tar"] += [lambda answer: answer] * 2 + [etag('"new"')]
    with pytest.raises(DataError, match=r"0\.tar': it changed while it was read.*index_shards"):
        remote_fetch(server, tmp_path).read(0, 0, 1)
    assert names(tmp_path) == []


@pytest.mark.parametrize("says_so", [True, False])
def test_a_server_without_ranges_is_read_from_the_start(tmp_path, says_so):
    serve = files({"/0.tar": contents(0)}, ranges=False)

    def without(method, path, headers):
        answer = serve(method, path, headers)
        if says_so:
            answer.headers["Accept-Ranges"] = "none"
        return answer

    with Server(without) as server:
        server.faults["GET", "/0.tar"] += [broken("close")]
        assert remote_fetch(server, tmp_path).read(0, 0, SIZE) == contents(0)
        with pytest.raises(DataError, match=r"0\.tar'.*only complete files: set data\.remote to cache"):
            remote_fetch(server, None, remote="ranged").read(0, SIZE // 2, 10)


def test_ranged_reads_ask_for_their_bytes_alone(server, tmp_path):
    fetch = remote_fetch(server, tmp_path / "unused", remote="ranged")
    fetch.prefetch([0, 1])
    random = np.random.default_rng(1)
    expected = []
    for _ in range(20):
        offset = random.integers(SIZE - 100).item()
        assert fetch.read(3, offset, 100) == contents(3)[offset : offset + 100]
        expected.append(f"bytes={offset}-{offset + 99}")
    assert server.ranges("/3.tar") == expected
    assert names(tmp_path) == []
    with pytest.raises(DataError, match=r"3\.tar'.*set data\.remote to cache"):
        fetch.local(3)
    with pytest.raises(DataError, match=r"3\.tar': it ends before byte 100,001"):
        fetch.read(3, SIZE - 10, 11)


@pytest.mark.parametrize("fault", [broken("close"), broken("reset"), broken("stall"), short, status(503, "Busy")])
def test_a_ranged_read_is_repeated(server, fault):
    server.faults["GET", "/0.tar"] += [fault] * 2
    assert remote_fetch(server, None, remote="ranged").read(0, 10, 1000) == contents(0)[10:1010]


def test_a_ranged_read_of_another_version_is_named(tmp_path):
    shards = {"/0.tar": contents(0)}
    with Server(files(shards)) as server:
        fetch = remote_fetch(server, None, remote="ranged")
        assert fetch.read(0, 0, 10) == contents(0)[:10]
        shards["/0.tar"] = contents(1)
        with pytest.raises(DataError, match=r"0\.tar'.*changed since it was indexed"):
            fetch.read(0, 0, 10)


def test_other_stores_of_fsspec_work(tmp_path):
    import fsspec

    with fsspec.open("memory://fetch/a.tar", "wb") as file:
        file.write(contents(0))
    for config in (FetchConfig(), FetchConfig(remote="ranged")):
        fetch = Fetch(["memory://fetch/a.tar"], [SIZE], [""], tmp_path, config)
        assert fetch.read(0, 123, 456) == contents(0)[123:579]


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"^shard 'gs://b/a\.tar'.*pip install -e '\.\[gs\]'$"):
        Fetch(["gs://b/a.tar"], [1], [""], tmp_path, FetchConfig()).read(0, 0, 1)


@pytest.mark.parametrize("code", [404, 403, 503])
def test_no_secret_in_a_message_or_log(server, tmp_path, code, caplog):
    caplog.set_level(logging.INFO)
    server.always["GET", "/0.tar"] = server.always["HEAD", "/0.tar"] = status(code, "No")
    secret = server.url.replace("http://", "http://user:hunter2@") + "/0.tar?X-Amz-Signature=hunter2"
    fetch = Fetch([secret], [SIZE], [""], tmp_path, FetchConfig(retry_seconds=0.3))
    with pytest.raises(DataError, match=r"/0\.tar'") as caught:
        fetch.read(0, 0, 1)
    assert "hunter2" not in str(caught.value) + caplog.text
    assert "hunter2" not in remote.summarize(OSError(f"cannot open {secret} now"))


def test_an_extra_that_is_named_where_a_package_lacks_is_one_of_setup_py(monkeypatch):
    asked = {}
    monkeypatch.setattr("setuptools.setup", asked.update)
    runpy.run_path(str(Path(__file__).parents[2] / "setup.py"))
    assert set(remote.EXTRAS.values()) <= asked["extras_require"].keys()
