"""Building an index: shards are scanned in parallel, one file each, and the manifest is written last.

A build that was killed, at any moment, leaves whole files or none. The next one keeps those whose shard is as it
was, and ends with the same bytes as a build that was not interrupted.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from concurrent.futures.thread import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa

from mug.data.columnar import scan_columnar
from mug.data.errors import DataError
from mug.data.index import MANIFEST, VERSION, Index, rows_name
from mug.data.remote import shown
from mug.data.rows import Scan, digest
from mug.data.samples import LOCAL_WINDOW, REMOTE_WINDOW, scan_tar
from mug.data.sources import Source, Stamp, expand, file_name, read_beside, stamp
from mug.data.tar import BLOCK

LOCK = "index.lock"
SHARDS_PER_PROCESS = 16  # fewer are scanned sooner than a process starts

log = logging.getLogger("mug")


@dataclass(frozen=True)
class Shard:
    """What a scan says of one shard. left_out: keys without an image. no_caption: samples without text.

    failure: why it cannot be used, in one line that names it; empty where it can. reused: from an earlier build.
    """

    url: str
    stamp: Stamp = field(default_factory=lambda: Stamp(0, "", 0))
    format: str = ""
    size: int = 0
    count: int = 0
    left_out: int = 0
    no_caption: int = 0
    digest: str = ""
    failure: str = ""
    reused: bool = False

    def facts(self) -> dict:
        """What is kept with its rows: nothing of where it lies, or of how this build went."""
        return {name: value for name, value in asdict(self).items() if name not in ("url", "failure", "reused")}


Progress = Callable[[int, Shard], None]  # (shards done, the latest)


def build_index(urls: list[str], out: Path, workers: int, progress: Progress = lambda done, shard: None) -> list[Shard]:
    """Index the shards into the folder `out`, by `workers` processes (0 or 1: in this one).

    Returns one Shard each, in their order. Where one has failed, all others are indexed, and the index stays
    unfinished: building again, when that one is mended, scans what is missing. Workers import the script that was
    started, so it must begin its work under `if __name__ == "__main__"`.

    Raises:
        DataError: no shard holds an image, or `out` cannot be written or holds something else.
    """
    with _locked(out):
        return _build(urls, out, workers, progress)


def index_for(patterns: str, cache: Path) -> Index:
    """The index in the folder that `patterns` names, or that of the shards it names, built once under `cache`.

    Shards that change get another index. Safe to call from any number of processes: one builds, the others wait.

    Raises:
        DataError: a shard is missing or cannot be used.
    """
    if (Path(patterns).expanduser() / MANIFEST).is_file():
        return Index.open(Path(patterns).expanduser())
    urls = expand(patterns)
    with ThreadPoolExecutor(32) as pool:  # a server takes its time to answer
        stamps = list(pool.map(stamp, urls))
    identity = json.dumps([VERSION, *([url, *asdict(s).values()] for url, s in zip(urls, stamps, strict=True))])
    folder = cache.expanduser() / "index" / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if not (folder / MANIFEST).is_file():
        with _locked(folder):
            if not (folder / MANIFEST).is_file():
                log.info("indexing %d shards in %s (once)", len(urls), folder)
                shards = _build(urls, folder, os.cpu_count() or 1, lambda done, shard: None)
                failures = [shard.failure for shard in shards if shard.failure]
                if failures:
                    more = f" (and {len(failures) - 1} more shards)" if failures[1:] else ""
                    raise DataError(failures[0] + more)
    return Index.open(folder)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder `out`, made if need be, alone; what a killed build left half-written is removed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / LOCK).exists() and any(out.iterdir()):
            raise DataError(f"'{out}' holds other files than an index: name a new folder")
        with open(out / LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it however this process ends
            for stale in out.glob("*.tmp"):
                stale.unlink(missing_ok=True)
            yield
    except OSError as error:
        raise DataError(f"index folder '{out}' cannot be written ({error}): name another") from error


def _build(urls: list[str], out: Path, workers: int, progress: Progress) -> list[Shard]:
    (out / MANIFEST).unlink(missing_ok=True)  # until all rows are those of these shards
    found: dict[int, Shard] = {}
    for i, shard in _scan_all(urls, out, min(workers, len(urls) // SHARDS_PER_PROCESS)):
        found[i] = shard
        progress(len(found), shard)
    shards = [found[i] for i in range(len(urls))]
    for shard in shards:
        if shard.left_out and not shard.reused:
            log.warning("shard '%s': left out %d keys without an image", shown(shard.url), shard.left_out)
    if any(shard.failure for shard in shards):
        return shards
    if not sum(shard.count for shard in shards):
        raise DataError(f"no images in {len(shards)} shards, '{shown(urls[0])}' the first: name others")
    for path in out.glob("*.arrow"):
        if re.fullmatch(r"\d{5,}", path.stem) and int(path.stem) >= len(urls):  # of an earlier, longer list
            path.unlink()
    _write_manifest(out, shards)
    return shards


def _scan_all(urls: list[str], out: Path, workers: int) -> Iterator[tuple[int, Shard]]:
    """(place, Shard) of each, as they are done."""
    if workers <= 1:
        for i, url in enumerate(urls):
            yield i, index_shard(url, out, i)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the threads of a training process
    with ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
        places: dict[Future, int] = {pool.submit(index_shard, url, out, i): i for i, url in enumerate(urls)}
        try:
            for future in as_completed(places):
                yield places.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that scans was killed: start again with fewer workers, or more memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this process when its parent ends, even if that is killed: there is no one to hand results to."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def index_shard(url: str, out: Path, place: int) -> Shard:
    """Scan one shard and write its rows, unless they are there already; a failure is said in the result."""
    path = out / rows_name(place)
    try:
        now = stamp(url)
        earlier = _read_shard(path, url)
        if earlier and earlier.stamp == now:
            return earlier
        with Source(url, now.size, path.with_suffix(f".{os.getpid()}.copy.tmp")) as source:
            found = _scan(source)
            size = source.size
        text_length = found.rows["text_length"].to_numpy()
        shard = Shard(
            url=url,
            stamp=now,
            format=found.format,
            size=size,
            count=len(found.rows),
            left_out=found.left_out,
            no_caption=int((text_length < 0).sum()),
            digest=digest(found.rows),
        )
        _check_stats(shard)
        facts = {
            "digest": shard.digest,
            "facts": json.dumps({"name": file_name(url), "version": VERSION, **shard.facts()}),
        }
        _write_arrow(path, found.rows.replace_schema_metadata(facts))
        return shard
    except DataError as error:
        named = str(error) if shown(url) in str(error) else f"shard '{shown(url)}' {error}"
        return Shard(url, failure=named)
    except OSError as error:
        return Shard(url, failure=f"shard '{shown(url)}' cannot be read: {error}")


def _scan(source: Source) -> Scan:
    if source.size < 0:  # its server does not say
        source.local()
    start = source.read(0, BLOCK)
    if not start:
        raise DataError("is empty: fetch or write it anew")
    if start.startswith((b"ARROW1", b"PAR1", b"\xff\xff\xff\xff")):
        return scan_columnar(source.local())
    return scan_tar(source.read, source.size, LOCAL_WINDOW if source.path else REMOTE_WINDOW)


def _check_stats(shard: Shard) -> None:
    """img2dataset writes 00000_stats.json beside 00000.tar: a shard with another number of samples was cut or mixed."""
    name = file_name(shard.url).rpartition(".")[0] + "_stats.json"
    data = read_beside(shard.url, name)
    if data is None:
        return
    try:
        expected = json.loads(data)["successes"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"has a damaged {name} beside it ({error}): fetch that anew or delete it") from error
    if expected != shard.count:
        raise DataError(f"holds {shard.count:,} samples, but {name} says {expected:,}: fetch both anew")


def _read_shard(path: Path, url: str) -> Shard | None:
    """What an earlier build said of the shard `url` at this place; None where there is nothing to use."""
    try:
        with pa.memory_map(str(path)) as file:
            facts = json.loads(pa.ipc.open_file(file).schema.metadata[b"facts"])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    if (facts.pop("name"), facts.pop("version")) != (file_name(url), VERSION):
        return None
    return Shard(**{**facts, "url": url, "stamp": Stamp(**facts["stamp"]), "reused": True})


def _write_manifest(out: Path, shards: list[Shard]) -> None:
    identity = [[file_name(shard.url), shard.size, shard.format, shard.digest] for shard in shards]
    facts = {"version": VERSION, "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest()}
    columns = {
        name: [getattr(shard, name) for shard in shards] for name in ("url", "format", "size", "count", "digest")
    }
    columns["etag"] = [shard.stamp.etag for shard in shards]
    _sync(out)  # the rows before the manifest that vouches for them
    _write_arrow(out / MANIFEST, pa.RecordBatch.from_pydict(columns).replace_schema_metadata(facts))
    _sync(out)


def _write_arrow(path: Path, batch: pa.RecordBatch) -> None:
    """Atomic: under another name until all is on the disk."""
    writing = path.with_suffix(f".{os.getpid()}.tmp")
    with open(writing, "wb") as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())
    writing.replace(path)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
