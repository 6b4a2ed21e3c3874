"""The S3 protocol, spoken by moto's server on loopback behind a proxy that injects faults."""

import itertools
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
from faulty_server import Fault, Server, broken, etag, fine, proxy, short, status
from moto.server import ThreadedMotoServer

from mug.data.builders.writers import write_tar
from mug.data.config import DataConfig
from mug.data.errors import DataError
from mug.data.index.build import build_index, index_for
from mug.data.kinds.samples import Shape
from mug.data.mixture import StreamConfig, open_stream
from mug.data.store import fetch as fetch_module
from mug.data.store import remote
from mug.data.store.expand import read_beside
from mug.data.store.fetch import Fetch, FetchConfig
from mug.data.stream import BatchShard

SIZE = 200_000
PIECE = 60_000
SHARDS = 6
STARTS = [*range(0, SIZE, PIECE)]
BUSY = [status(429, "TooManyRequests"), status(503, "SlowDown"), status(500, "InternalError")]
BREAKS = [broken("stall"), broken("close"), broken("reset"), short]


def contents(shard: int) -> bytes:
    return np.random.default_rng(100 + shard).bytes(SIZE)


@pytest.fixture(scope="module")
def moto():
    """URL of moto's server with the shards, and their ETags."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    names = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=url, **names)
    client.create_bucket(Bucket="bucket")
    etags = [
        client.put_object(Bucket="bucket", Key=f"{shard}.tar", Body=contents(shard))["ETag"] for shard in range(SHARDS)
    ]
    yield url, etags
    server.stop()


@pytest.fixture
def server(moto, monkeypatch):
    monkeypatch.setattr(fetch_module, "PIECE", PIECE)
    monkeypatch.setattr(fetch_module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(remote, "READ_SECONDS", 1.0)
    with Server(proxy(moto[0])) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        remote.stores_of.cache_clear()  # of another server
        yield server


def make(moto, folder: Path, **config) -> Fetch:
    urls = [f"s3://bucket/{shard}.tar" for shard in range(SHARDS)]
    return Fetch(urls, [SIZE] * SHARDS, moto[1], folder, FetchConfig(**{"retry_seconds": 20.0} | config))


def starts(server: Server, shard: int) -> list[int]:
    return [int(re.match(r"bytes=(\d+)-", asked)[1]) for asked in server.ranges(f"/bucket/{shard}.tar")]


def test_shards_come_whole_and_once(server, moto, tmp_path):
    fetch = make(moto, tmp_path)
    fetch.prefetch(range(SHARDS))
    for shard in range(SHARDS):
        assert fetch.read(shard, 0, SIZE) == contents(shard)
        assert starts(server, shard) == STARTS
    assert len(list(tmp_path.iterdir())) == SHARDS


@pytest.mark.parametrize("fault", BUSY, ids=["429", "503", "500"])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_busy_store_is_asked_again(server, moto, tmp_path, fault, method):
    server.faults[method, "/bucket/0.tar"] += [fine] * (method == "GET") + [fault] * 3
    assert make(moto, tmp_path).read(0, 0, SIZE) == contents(0)
    asked = starts(server, 0)
    assert sorted(set(asked)) == STARTS
    assert len(asked) == len(STARTS) + 3 * (method == "GET")  # our retries alone: the client adds none
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("fault", BREAKS, ids=["stall", "close", "reset", "short"])
def test_a_broken_transfer_continues_where_it_was(server, moto, tmp_path, fault):
    server.faults["GET", "/bucket/0.tar"] += [fine, fault]
    began = time.monotonic()
    assert make(moto, tmp_path).read(0, 0, SIZE) == contents(0)
    assert time.monotonic() - began < 10
    again = [0, 60_000, 90_000, 150_000] if fault is short else [0, 60_000, 60_000, 120_000, 180_000]
    assert starts(server, 0) == again


@pytest.mark.parametrize("ranged", [True, False])
def test_another_etag_is_named_at_once(server, moto, tmp_path, ranged):
    server.always["HEAD", "/bucket/0.tar"] = etag('"of another version"')
    with pytest.raises(DataError, match=r"^shard 's3://bucket/0\.tar': its ETag is .*rerun index_shards$"):
        make(moto, tmp_path, remote="ranged" if ranged else "cache").read(0, 0, 1)
    assert not server.ranges("/bucket/0.tar")
    assert not list(tmp_path.iterdir())


def test_an_object_that_is_replaced_during_the_transfer_is_named(server, moto, tmp_path):
    """The store itself refuses the pieces: If-Match."""
    client = boto3.client("s3", endpoint_url=moto[0])

    def replace(answer):
        client.put_object(Bucket="bucket", Key="replaced.tar", Body=contents(1))
        return answer

    mark = client.put_object(Bucket="bucket", Key="replaced.tar", Body=contents(0))["ETag"]
    server.faults["GET", "/bucket/replaced.tar"] += [replace]
    fetch = Fetch(["s3://bucket/replaced.tar"], [SIZE], [mark], tmp_path, FetchConfig(retry_seconds=20.0))
    with pytest.raises(DataError, match=r"^shard 's3://bucket/replaced\.tar'.*changed since it was indexed"):
        fetch.read(0, 0, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ranged", [True, False])
def test_a_shard_that_is_gone_is_named_at_once(server, moto, tmp_path, ranged):
    fetch = Fetch(["s3://bucket/none.tar"], [SIZE], [""], tmp_path, FetchConfig(remote="ranged" if ranged else "cache"))
    began = time.monotonic()
    with pytest.raises(DataError, match=r"^shard 's3://bucket/none\.tar' does not exist: restore it"):
        fetch.read(0, 0, 1)
    assert time.monotonic() - began < 10


def test_a_shard_that_goes_during_the_transfer_is_named(server, moto, tmp_path):
    server.faults["GET", "/bucket/0.tar"] += [fine, status(404, "NoSuchKey")]
    with pytest.raises(DataError, match=r"0\.tar' does not exist"):
        make(moto, tmp_path).read(0, 0, 1)
    assert not list(tmp_path.iterdir())


def test_denied_access_names_credentials(server, moto, tmp_path):
    server.always["HEAD", "/bucket/0.tar"] = status(403, "AccessDenied")
    with pytest.raises(DataError, match=r"^shard 's3://bucket/0\.tar'.*credentials"):
        make(moto, tmp_path).read(0, 0, 1)


def test_missing_credentials_are_named(server, moto, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"^shard 's3://bucket/0\.tar'.*credentials"):
        make(moto, tmp_path / "cache").read(0, 0, 1)


@pytest.mark.parametrize(
    "fault", [status(503, "SlowDown"), broken("stall"), broken("reset")], ids=["503", "stall", "reset"]
)
@pytest.mark.parametrize("ranged", [True, False])
def test_the_budget_ends_with_the_name(server, moto, tmp_path, fault, ranged):
    server.always["GET", "/bucket/0.tar"] = fault
    fetch = make(moto, tmp_path, retry_seconds=3.0, remote="ranged" if ranged else "cache")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"^shard 's3://bucket/0\.tar': gave up after 3 s .* data\.retry_seconds$"):
        fetch.read(0, 0, 1000)
    assert 2.9 < time.monotonic() - began < 11.5
    assert not list(tmp_path.iterdir())
    assert fetch.read(1, 0, SIZE) == contents(1)  # others are not harmed


def test_slow_progress_is_no_end(server, moto, tmp_path):
    """Each piece fails for most of the budget, all of them for much longer than it."""
    server.faults["GET", "/bucket/0.tar"] += [broken("stall"), fine] * len(STARTS)
    fetch = make(moto, tmp_path, retry_seconds=3.0)
    fetch.read(1, 0, 1)  # it takes seconds to make the client
    began = time.monotonic()
    assert fetch.read(0, 0, SIZE) == contents(0)
    assert time.monotonic() - began > 3


@pytest.mark.parametrize("ranged", [True, False])
def test_no_read_is_lost_or_wrong_under_any_faults(server, moto, tmp_path, ranged):
    """Two readers in threads, random faults on every shard, room for three: every byte is right, in bounded time."""
    random = np.random.default_rng(ranged)
    choices: list[Fault] = [fine, fine, fine, *BUSY, broken("close"), broken("reset"), short]
    for shard in range(SHARDS):
        server.faults["GET", f"/bucket/{shard}.tar"] += [choices[i] for i in random.integers(len(choices), size=10)]
        server.faults["HEAD", f"/bucket/{shard}.tar"] += [[fine, *BUSY][i] for i in random.integers(4, size=4)]
    right = []

    def read(order):
        options = {"remote": "ranged" if ranged else "cache", "cache_gb": 3 * SIZE / 1e9, "prefetch": 1}
        fetch = make(moto, tmp_path, **options)
        for i, shard in enumerate(order):
            fetch.prefetch(order[i + 1 :])
            offset = random.integers(SIZE - 5000).item()
            right.append(fetch.read(shard, offset, 5000) == contents(shard)[offset : offset + 5000])

    orders = [random.permutation(SHARDS).tolist() for _ in range(2)]
    threads = [threading.Thread(target=read, args=(order,), daemon=True) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert right == [True] * 2 * SHARDS


WORKER = """
import sys
from pathlib import Path
from torch.utils.data import DataLoader, Dataset
from mug.data.store.fetch import Fetch, FetchConfig
from mug.data.store.expand import read_beside
from mug.data.workers import worker_settings
from mug.data.builders.writers import write_tar

class Samples(Dataset):
    def __init__(self, fetch, size): self.fetch, self.size = fetch, size
    def __len__(self): return 24
    def __getitem__(self, i):
        self.fetch.prefetch([i // 4 + 1] if i < 20 else [])
        return self.fetch.read(i // 4, i % 4 * self.size // 4, self.size // 4)

if __name__ == "__main__":
    folder, size, *etags = sys.argv[1:]
    urls = [f"s3://bucket/{shard}.tar" for shard in range(6)]
    fetch = Fetch(urls, [int(size)] * 6, etags, Path(folder), FetchConfig())
    fetch.read(0, 0, 1)  # the parent has connections and threads of its own
    data = b"".join(DataLoader(Samples(fetch, int(size)), batch_size=None, **worker_settings(2)))
    sys.stdout.buffer.write(data)
"""


@pytest.mark.slow
def test_the_workers_of_a_data_loader_share_the_cache(server, moto, tmp_path):
    (tmp_path / "script.py").write_text(WORKER)
    command = [sys.executable, tmp_path / "script.py", tmp_path / "cache", str(SIZE), *moto[1]]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=300)
    assert done.returncode == 0
    assert done.stdout == b"".join(contents(shard) for shard in range(SHARDS))
    assert [starts(server, shard) for shard in range(SHARDS)] == [[0]] * SHARDS
    assert len(list((tmp_path / "cache").iterdir())) == SHARDS


@pytest.mark.parametrize("ranged", [True, False])
def test_the_stream_of_a_store_is_that_of_the_disk(server, moto, tmp_path, make_shards, tokenizer_file, ranged):
    """Two ranks, faults on every shard while it is trained on: the same samples in the same order."""
    paths = make_shards(tmp_path / "pairs", [12, 9, 16, 11])
    client = boto3.client("s3", endpoint_url=moto[0])  # past the proxy, which only reads
    for path in paths:
        client.put_object(Bucket="bucket", Key=f"pairs/{ranged}/{path.name}", Body=path.read_bytes())
    expected = steps_of(f"{tmp_path}/pairs/*.tar", tokenizer_file, tmp_path)
    shards = f"s3://bucket/pairs/{ranged}/*.tar"
    index_for(shards, tmp_path / "cache")
    for path in paths:
        key = f"/bucket/pairs/{ranged}/{path.name}"
        server.faults["GET", key] += [*BUSY, broken("close"), broken("reset"), short]
        server.faults["HEAD", key] += [fine, *BUSY]
    remote = "ranged" if ranged else "cache"
    assert steps_of(shards, tokenizer_file, tmp_path, remote) == expected
    assert all(not waiting for waiting in server.faults.values())  # each of them has struck


def steps_of(shards: str, tokenizer: Path, folder: Path, remote: str = "cache") -> list[list[tuple]]:
    """(position, bytes of the image, tokens) of 5 steps of 24 samples, of two ranks in turn: two epochs and a half."""
    config = DataConfig(
        shards=shards, tokenizer=str(tokenizer), cache=str(folder / "cache"), workers=0, remote=remote, retry_seconds=20
    )
    shape = Shape(image_size=16, text_length=8)
    streams = [open_stream({"s3": StreamConfig(config)}, 0, shape, BatchShard(24, 6, rank, 2)) for rank in range(2)]
    return [
        [
            (int(position), image.numpy().tobytes(), tuple(tokens.tolist()))
            for micro_batches in ranks
            for batch in micro_batches
            for image, tokens, position in zip(batch["image"], batch["tokens"], batch["position"], strict=True)
        ]
        for ranks in itertools.islice(zip(*streams, strict=True), 5)
    ]


@pytest.mark.parametrize("code", [403, 404, 401])
def test_rights_to_get_but_not_to_list_are_enough(server, moto, tmp_path, code):
    """For a key that is not there such a store answers 403: the optional counts next to a shard are absent."""
    member = tmp_path / "shard.tar"
    write_tar(member, [("k.png", b"image"), ("k.txt", b"text")])
    boto3.client("s3", endpoint_url=moto[0]).put_object(Bucket="bucket", Key="rights.tar", Body=member.read_bytes())
    for method in ("HEAD", "GET"):
        server.always[method, "/bucket/rights_stats.json"] = status(code, "AccessDenied")
    server.always["GET", "/bucket"] = status(403, "AccessDenied")  # a listing
    (shard,) = build_index(["s3://bucket/rights.tar"], tmp_path / "index", 0)
    assert (shard.failure, shard.count) == ("", 1)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_busy_store_is_asked_again_by_who_indexes(server, moto, tmp_path, method):
    path = tmp_path / "shard.tar"
    write_tar(path, [("k.png", b"image"), ("k.txt", b"text")])
    boto3.client("s3", endpoint_url=moto[0]).put_object(Bucket="bucket", Key="busy.tar", Body=path.read_bytes())
    server.faults[method, "/bucket/busy.tar"] += [status(503, "SlowDown")] * 2
    (shard,) = build_index(["s3://bucket/busy.tar"], tmp_path / "index", 0)
    assert (shard.failure, shard.count) == ("", 1)
    assert not server.faults[method, "/bucket/busy.tar"]


def test_a_store_that_fails_for_the_counts_is_asked_again_not_believed(server, moto, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "INDEX_SECONDS", 0.5)
    for method in ("HEAD", "GET"):
        server.always[method, "/bucket/0_stats.json"] = status(500, "InternalError")
    with pytest.raises(DataError, match=r"gave up after 0\.5 s .*, then rerun$"):
        read_beside("s3://bucket/0.tar", "0_stats.json")
