"""Building an index: shards are scanned in parallel, one file each, and the manifest is written last.

A build that was killed, at any moment, leaves complete files or none. The next one keeps those whose shard is as it
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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from concurrent.futures.thread import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from mug.data.errors import DataError, printable
from mug.data.index.columnar import NAMES, scan_columnar
from mug.data.index.index import MANIFEST, VERSION, Index, build_of, read_manifest, retired_name, rows_name, rows_names
from mug.data.index.rows import Scan, digest
from mug.data.index.tar import BLOCK
from mug.data.index.tar_samples import LOCAL_WINDOW, REMOTE_WINDOW, scan_tar
from mug.data.left_out import LeftOut
from mug.data.parent import end_with_parent
from mug.data.store.disk_cache import Descriptor
from mug.data.store.expand import FileVersion, Source, expand, file_name, read_beside, stamp
from mug.data.store.identity import seal
from mug.data.store.remote import redact_url, unsigned

LOCK = "index.lock"
LARGE_GROUP = 2**28  # bytes, about as many as a reader keeps decoded
ROWS = re.compile(r"\d{5,}(-[0-9a-f]+)?\.arrow")
SHARDS_PER_PROCESS = 16  # fewer are scanned sooner than a process starts

log = logging.getLogger("mug")


@dataclass(frozen=True)
class Shard:
    """The result of a scan of one shard.

    left_out, no_caption, seen, choice, group_bytes, texts: see `mug.data.index.rows.Scan`. caption: what was named to
    hold the captions. seal: see `mug.data.store.identity`, empty where an ETag replaces it. rows: the name of the file
    that holds its rows. failure: why it cannot be used, in one line that names it; empty where it can. reused: from an
    earlier build.
    """

    url: str
    stamp: FileVersion = field(default_factory=lambda: FileVersion(0, "", 0))
    format: str = ""
    size: int = 0
    count: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    no_caption: int = 0
    group_bytes: int = 0
    texts: bool = False
    digest: str = ""
    caption: str | None = None
    seen: str = ""
    choice: str = ""
    seal: str = ""
    rows: str = ""
    failure: str = ""
    reused: bool = False

    def facts(self) -> dict:
        """Returns what is kept with its rows: nothing of where it lies, or of how this build went."""
        return {name: value for name, value in asdict(self).items() if name not in ("url", "rows", "failure", "reused")}


Progress = Callable[[int, Shard], None]  # (shards done, the latest)


def build_index(
    urls: list[str],
    out: Path,
    workers: int,
    progress: Progress = lambda done, shard: None,
    caption: str | None = None,
) -> list[Shard]:
    """Index the shards into the folder `out`, by `workers` processes (0 or 1: in this one).

    `caption` names the column (Arrow, Parquet) or the extension (tar) of the captions; without it, the likeliest.

    Returns one Shard each, in their order. Where one has failed, all others are indexed, and the index stays
    unfinished: building again, when that one is fixed, scans what is missing. Workers import the script that was
    started, so it must begin its work under `if __name__ == "__main__"`.

    Raises:
        DataError: no shard holds a sample, or `out` cannot be written or holds something else.
    """
    with _locked(out):
        return _build(urls, out, workers, progress, caption)


def index_for(patterns: str | list[str], cache: Path, caption: str | None = None, images_needed: bool = True) -> Index:
    """Opens the index in the folder that `patterns` names, or that of the shards it names, built once under `cache`.

    `caption` as in `build_index`; an index in a folder must have been written with it. Shards that change get another
    index. Safe to call from any number of processes: one builds, the others wait.

    Raises:
        DataError: a shard is missing or cannot be used, or holds no images where they are needed, or an index is
            unfinished or of other captions.
    """
    index = _open(patterns, cache, caption)
    if images_needed and index.texts:
        raise DataError(f"no images in {index.texts}: name others, or columns of images {', '.join(NAMES['image'])}")
    return index


def _open(patterns: str | list[str], cache: Path, caption: str | None) -> Index:
    if isinstance(patterns, str) and os.path.isdir(folder := os.path.expanduser(patterns)):
        return _open_folder(Path(folder), caption)
    urls = expand(patterns)
    with ThreadPoolExecutor(32) as pool:  # a server takes its time to answer
        stamps = list(pool.map(stamp, urls))
    identity = json.dumps([VERSION, *(_identity(url, one, caption) for url, one in zip(urls, stamps, strict=True))])
    folder = cache.expanduser() / "index" / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if not _is_built(folder):
        with _locked(folder):
            if not _is_built(folder):
                log.info("indexing %d shards in %s (once)", len(urls), folder)
                shards = _build(urls, folder, os.cpu_count() or 1, lambda done, shard: None, caption)
                failures = [shard.failure for shard in shards if shard.failure]
                if failures:
                    more = f" (and {len(failures) - 1} more shards)" if failures[1:] else ""
                    raise DataError(failures[0] + more)
    return Index.open(folder, urls if any(unsigned(url) != url for url in urls) else None)


def _identity(url: str, stamp: FileVersion, caption: str | None) -> list:
    """Returns what identifies a scan: the shard's full path, the marks of its content, and what was named."""
    return [unsigned(url) if stamp.etag else url, *asdict(stamp).values(), *([] if caption is None else [caption])]


def _open_folder(folder: Path, caption: str | None) -> Index:
    if not (folder / MANIFEST).is_file() and not (folder / LOCK).exists():
        raise DataError(f"'{folder}' is a folder without an index: give the shards in it, as '{folder}/*.tar'")
    index = Index.open(folder)
    if index.lacks_signatures:
        raise DataError(f"index '{folder}' is of signed URLs, whose signatures no index keeps: give the URLs instead")
    if caption not in (None, index.caption):
        raise DataError(
            f"index '{folder}' was not written for data.caption {caption}: run/index_shards.py --caption {caption}"
            " writes one that is"
        )
    return index


def _is_built(folder: Path) -> bool:
    """Whether the index is complete, and of scans that looked for as many names of captions as today's."""
    return (folder / MANIFEST).is_file() and Index.open(folder).seen is not None


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock the folder `out`, created if need be; what a killed build left half-written is removed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / LOCK).exists() and any(out.iterdir()):
            raise DataError(f"'{out}' holds other files than an index: choose a new directory")
        with open(out / LOCK, "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it however this process ends
            for stale in out.glob("*.tmp"):
                stale.unlink(missing_ok=True)
            yield
    except OSError as error:
        raise DataError(f"index folder '{out}' cannot be written ({error}): choose another") from error


def _build(urls: list[str], out: Path, workers: int, progress: Progress, caption: str | None) -> list[Shard]:
    found: dict[int, Shard] = {}
    for i, shard in _scan_all(urls, out, min(workers, len(urls) // SHARDS_PER_PROCESS), caption):
        found[i] = shard
        progress(len(found), shard)
    shards = [found[i] for i in range(len(urls))]
    left_out = LeftOut()
    for shard in shards:
        left_out.merge(shard.left_out, f" in shard '{redact_url(shard.url)}'")
    for kind, (count, first) in left_out.kinds.items():
        log.warning("left out %s %s, the first %s", f"{count:,}", kind, first)
    if large := [shard for shard in shards if shard.group_bytes > LARGE_GROUP]:
        log.warning(
            "%d shards have large row groups: to read one sample of '%s', %.1f GB are decoded, in each process: rewrite"
            " them with groups of about 100 rows (row_group_size=100)",
            len(large),
            redact_url(large[0].url),
            large[0].group_bytes / 1e9,
        )
    if any(shard.failure for shard in shards):
        return shards
    if not sum(shard.count for shard in shards):
        raise DataError(
            f"no images or texts in {len(shards)} shards, '{redact_url(urls[0])}' the first, which has"
            f" {shards[0].seen}: name others"
        )
    _write_manifest(out, shards, left_out)
    return shards


def _scan_all(urls: list[str], out: Path, workers: int, caption: str | None) -> Iterator[tuple[int, Shard]]:
    """Yields (place, Shard) of each, as they are done."""
    if workers <= 1:
        for i, url in enumerate(urls):
            yield i, index_shard(url, out, i, caption)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the threads of a training process
    with ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool:
        places: dict[Future, int] = {pool.submit(index_shard, url, out, i, caption): i for i, url in enumerate(urls)}
        try:
            for future in as_completed(places):
                yield places.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DataError("a process that scans was killed: rerun with fewer workers, or more memory") from error
        finally:
            pool.shutdown(cancel_futures=True)


def index_shard(url: str, out: Path, place: int, caption: str | None) -> Shard:
    """Scan one shard and write its rows, unless they are there already; a failure is reported in the result."""
    name = printable(redact_url(url))
    try:
        if name != redact_url(url):
            raise DataError("has a name that is not UTF-8: rename it")
        now = stamp(url)
        key = _key(_identity(url, now, caption))
        if earlier := _read_shard(out / rows_name(place, key), url, key):
            return earlier
        shard, rows = _scan_shard(url, now, out / f"{place:05d}.{os.getpid()}.copy.tmp", caption)
        _check_stats(shard)
        if not (now.etag or now.changed):  # nothing marks the content, so it is scanned each time
            key = _key([key, shard.digest])
        shard = replace(shard, rows=rows_name(place, key))
        facts = {"digest": shard.digest, "facts": json.dumps({"key": key, "version": VERSION, **shard.facts()})}
        _write_arrow(out / shard.rows, rows.replace_schema_metadata(facts))
        return shard
    except DataError as error:
        return Shard(url, failure=str(error) if name in str(error) else f"shard '{name}' {error}")
    except OSError as error:
        return Shard(url, failure=f"shard '{name}' cannot be read: {error}")
    except Exception as error:  # an unexpected error in one shard must not stop the index of all others
        return Shard(url, failure=f"shard '{name}' cannot be read: {type(error).__name__}: {error}")


def _scan_shard(url: str, now: FileVersion, scratch: Path, caption: str | None) -> tuple[Shard, pa.RecordBatch]:
    """Returns the result of a scan of the shard, and its rows."""
    with Source(url, now.size, scratch) as source:
        found = _scan(source, caption)
        size = source.size
        sealed = "" if now.etag else seal(source.read, size)
    shard = Shard(
        url=url,
        stamp=now,
        format=found.format,
        size=size,
        count=len(found.rows),
        left_out=found.left_out,
        no_caption=found.no_caption,
        group_bytes=found.group_bytes,
        texts=found.texts,
        digest=digest(found.rows),
        caption=caption,
        seen=found.seen,
        choice=found.choice,
        seal=sealed,
    )
    return shard, found.rows


def _scan(source: Source, caption: str | None) -> Scan:
    if source.size < 0:  # its server does not report it
        source.local()
    start = source.read(0, BLOCK)
    if not start:
        raise DataError("is empty: fetch or rewrite it")
    if start.startswith((b"ARROW1", b"PAR1", b"\xff\xff\xff\xff")):
        return scan_columnar(source.local(), caption)
    return scan_tar(source.read, source.size, LOCAL_WINDOW if source.path else REMOTE_WINDOW, caption)


def _check_stats(shard: Shard) -> None:
    """Check img2dataset's 00000_stats.json next to 00000.tar: with another number of samples, it was cut or mixed."""
    name = file_name(shard.url).rpartition(".")[0] + "_stats.json"
    data = read_beside(shard.url, name)
    if data is None:
        return
    try:
        expected = json.loads(data)["successes"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"has a damaged {name} next to it ({error}): fetch it again or delete it") from error
    if expected != shard.count:
        raise DataError(f"holds {shard.count:,} samples, but {name} has {expected:,}: fetch both again")


def _key(identity: list) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _read_shard(path: Path, url: str, key: str) -> Shard | None:
    """Returns an earlier build's result for the shard `url`; None where there is none to use."""
    try:
        with pa.memory_map(str(path)) as file:
            facts = json.loads(pa.ipc.open_file(file).schema.metadata[b"facts"])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    if (facts.pop("key", None), facts.pop("version", None)) != (key, VERSION):
        return None
    facts |= {"stamp": FileVersion(**facts["stamp"]), "left_out": LeftOut(**facts["left_out"])}
    facts |= {"url": url, "rows": path.name, "reused": True}
    return Shard(**facts)


def _write_manifest(out: Path, shards: list[Shard], left_out: LeftOut) -> None:
    """Make these shards the index; one that readers have open keeps its files."""
    identity: list[Any] = [[file_name(shard.url), shard.size, shard.format, shard.digest] for shard in shards]
    caption, fewest = shards[0].caption, max(shards, key=lambda shard: shard.no_caption)
    named = {} if caption is None else {"caption": caption}
    identity += named.values()  # a row of a group has the same place in any column
    facts = {"version": VERSION, "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest()}
    facts |= {"seen": fewest.seen, **named}
    if texts := [shard for shard in shards if shard.texts]:
        first = texts[0]
        facts["texts"] = f"{len(texts)} shards, '{redact_url(first.url)}' the first, which has {first.seen}"
    if left_out:
        facts["left_out"] = json.dumps(left_out.kinds)
    if any(unsigned(shard.url) != shard.url for shard in shards):
        facts["signed"] = "1"
    names = ("format", "size", "count", "digest", "seal", "rows")
    columns = {name: [getattr(shard, name) for shard in shards] for name in names}
    columns |= {"url": [unsigned(shard.url) for shard in shards], "etag": [shard.stamp.etag for shard in shards]}
    _sync(out)  # the rows before the manifest that vouches for them
    retired = _retire(out)
    _write_arrow(out / MANIFEST, pa.RecordBatch.from_pydict(columns).replace_schema_metadata(facts))
    _sync(out)
    if retired:
        _clear(out)


def _retire(out: Path) -> bool:
    """Give the existing manifest another name, too; False where the file system has no links."""
    try:
        earlier = Descriptor(out / MANIFEST)
        found = os.fstat(earlier.number)
        os.link(out / MANIFEST, out / retired_name(build_of(earlier.read(0, found.st_size)), found.st_ino))
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _clear(out: Path) -> None:
    """Remove the retired manifests that no process has open, and the rows that no manifest names."""
    used = set(rows_names(read_manifest((out / MANIFEST).read_bytes())))
    for path in out.glob(retired_name("*", "*")):
        if not _removed(path):
            with contextlib.suppress(pa.ArrowException):  # damaged, so that no process reads it
                used |= set(rows_names(read_manifest(path.read_bytes())))
    for path in out.glob("*.arrow"):
        if ROWS.fullmatch(path.name) and path.name not in used:
            path.unlink()


def _removed(path: Path) -> bool:
    """Whether the manifest could be removed: no process holds a share of its lock."""
    try:
        held = Descriptor(path, os.O_RDWR)
        if not held.lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
    except OSError:  # a file system without locks does not show it
        return False
    path.unlink()  # under the lock: who opens it meanwhile sees that it is gone
    return True


def _write_arrow(path: Path, batch: pa.RecordBatch) -> None:
    """Write atomically: under another name until all is on the disk."""
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
