"""The index of a data set: for every sample of every shard, where its image, caption and json lie.

A folder holds `manifest.arrow`, one row a shard, and one `NNNNN-KEY.arrow` a shard, one row a sample; all are Arrow
IPC files, and a shard's rows are read through a memory map. So opening an index costs one small file, whatever the
number of samples. `mug.data.index.build` writes it.

No file that a manifest names is ever written again: an index is brought up to date by other files and another
manifest, which takes the place of the earlier one at once. The earlier one stays as `manifest-BUILD-N.arrow`, with its
files, while a process that opened it holds a share of its lock.
"""

import fcntl
import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from mug.data.errors import DataError
from mug.data.index.rows import PLACES
from mug.data.store.disk_cache import Descriptor
from mug.data.store.remote import redact_url

VERSION = "1"  # of the files' layout and of what their columns mean
MANIFEST = "manifest.arrow"
FORMATS = ("tar", "arrow", "arrow_batches", "parquet")
OPEN_SHARDS = 1024  # mapped at a time; a map needs no open file
OPENINGS = 100  # attempts to open a manifest that is replaced meanwhile


def rows_name(shard: int, key: str = "") -> str:
    return f"{shard:05d}-{key}.arrow" if key else f"{shard:05d}.arrow"


def retired_name(build: str, number: int | str) -> str:
    """Returns the name of a replaced manifest; `number` distinguishes those of the same bytes."""
    return f"manifest-{build}-{number}.arrow"


def build_of(manifest: bytes) -> str:
    """Returns the name of a build among others in its folder."""
    return hashlib.sha256(manifest).hexdigest()[:16]


def read_manifest(data: bytes) -> pa.Table:
    """Returns the shards in the bytes of a manifest, one row each."""
    return pa.ipc.open_file(pa.py_buffer(data)).read_all()


def rows_names(manifest: pa.Table) -> list[str]:
    """Returns the names of the files that hold the rows of its shards."""
    if "rows" in manifest.column_names:
        return manifest["rows"].to_pylist()
    return [rows_name(shard) for shard in range(len(manifest))]  # as they all were named before


@dataclass(frozen=True, eq=False)
class ShardRows:
    """The N samples of one shard, as columns in a memory map.

    `image_offset`, `image_length` and the same of `text` and `json`, int64 [N]: the place in bytes in the shard's
    file, the length -1 where there is none. In a shard of format 'arrow_batches' or 'parquet' the offset is a record
    batch or row group, the length a row in it (see `mug.data.index.columnar.Groups`).
    """

    image_offset: np.ndarray
    image_length: np.ndarray
    text_offset: np.ndarray
    text_length: np.ndarray
    json_offset: np.ndarray
    json_length: np.ndarray
    keys: pa.StringArray

    def __len__(self) -> int:
        return len(self.keys)


class Index:
    """The shards of a data set and access to their rows. Cheap to open and to pickle.

    urls, formats, etags, seals, digests: list [S] of strings; what is empty is not known. sizes: int64 [S], bytes.
    counts_S: int64 [S], samples of each shard. starts_S1: int64 [S+1], number of each shard's first sample, and of all
    samples. fingerprint: SHA-256 over the shards' names, sizes and formats and their samples' keys and places,
    wherever the shards and the index lie. left_out: what is not a sample: kind → how many, and the first.
    caption: the column or extension that was named to hold the captions, None where none was. seen: for messages, the
    columns or extensions of the shard with the fewest captions; None in an index that was written without. texts: how
    many of the shards hold texts without images, and the first of them with its columns or extensions, for a message.
    rows: a function, shard 0 to S-1 → its ShardRows, kept open for the next call, which raises a DataError where they
    are missing, damaged or of another build.
    """

    def __init__(self, folder: Path, manifest: pa.Table, urls: list[str] | None = None):
        self.folder = folder
        self.build = ""
        self._signed_urls = urls
        self._held: Descriptor | None = None  # the manifest, a share of whose lock keeps its files
        self.urls: list[str] = urls or manifest["url"].to_pylist()
        self.formats: list[str] = manifest["format"].to_pylist()
        self.etags: list[str] = manifest["etag"].to_pylist()
        self.seals: list[str] = (
            manifest["seal"].to_pylist() if "seal" in manifest.column_names else [""] * len(self.urls)
        )
        self.sizes = manifest["size"].to_numpy()
        self.counts_S = manifest["count"].to_numpy()
        self.starts_S1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts_S)])
        facts = {name.decode(): value.decode() for name, value in manifest.schema.metadata.items()}
        self.caption: str | None = facts.get("caption")
        self.seen: str | None = facts.get("seen")
        self.texts: str = facts.get("texts", "")
        self.fingerprint = facts["fingerprint"]
        self.lacks_signatures = urls is None and "signed" in facts
        self.left_out: dict[str, list] = json.loads(facts.get("left_out", "{}"))
        self.files = rows_names(manifest)
        self.digests: list[str] = manifest["digest"].to_pylist()
        self.rows = lru_cache(OPEN_SHARDS)(partial(_read_rows, folder, self.files, self.digests))

    @staticmethod
    def open(folder: Path | str, urls: list[str] | None = None, build: str = "") -> "Index":
        """Opens the index in `folder`.

        Args:
            folder: Where it is.
            urls: Of its shards, with the signatures that no index keeps.
            build: Which of the builds there; the latest if left out.

        Raises:
            DataError: it is missing, unfinished, damaged, or of another version.
        """
        folder = Path(folder)
        remedy = "write it with run/index_shards.py"
        try:
            held, data = _hold(folder, build)
            manifest = read_manifest(data)
            version = manifest.schema.metadata[b"version"].decode()
        except FileNotFoundError as error:
            if build:
                raise DataError(
                    f"index '{folder}' was rewritten, and the build that was read is gone: restart the run"
                ) from error
            raise DataError(
                f"no finished index in '{folder}': rerun run/index_shards.py with its shards, which reports those"
                " that stop it"
            ) from error
        except (OSError, pa.ArrowException, TypeError, KeyError) as error:
            raise DataError(f"index '{folder}': its {MANIFEST} is damaged ({error}): {remedy}") from error
        if version != VERSION:
            raise DataError(f"index '{folder}' has version {version}, but this is version {VERSION}: {remedy}")
        index = Index(folder, manifest, urls)
        index.build, index._held = build_of(data), held
        return index

    def __reduce__(self):
        return Index.open, (self.folder, self._signed_urls, self.build)

    def __len__(self) -> int:
        """Returns the number of samples N."""
        return int(self.starts_S1[-1])

    def key(self, shard: int, row: int) -> str:
        """Returns a sample's key."""
        return self.rows(shard).keys[row].as_py()

    def name(self, shard: int, row: int) -> str:
        """Returns a sample's name for a message: its shard and key."""
        return f"shard '{redact_url(self.urls[shard])}', key '{self.key(shard, row)}'"


def _read_rows(folder: Path, files: list[str], digests: list[str], shard: int) -> ShardRows:
    """Returns the rows of a shard, 0 to S-1.

    Raises:
        DataError: they are missing, damaged, or not those the manifest was written for.
    """
    path = folder / files[shard]
    try:
        with pa.memory_map(str(path)) as file:
            batch = pa.ipc.open_file(file).get_batch(0)
        if batch.schema.metadata[b"digest"].decode() != digests[shard]:
            raise DataError(f"index '{path}' is not of the same build as its {MANIFEST}: rewrite the index")
        return ShardRows(*(batch[name].to_numpy() for name in PLACES), keys=batch["key"])
    except (OSError, pa.ArrowException, KeyError, TypeError) as error:
        raise DataError(f"index '{path}' cannot be read ({error}): rewrite the index") from error


def _hold(folder: Path, build: str) -> tuple[Descriptor, bytes]:
    """Returns a manifest, a share of its lock held, and its bytes.

    Raises:
        OSError: it cannot be read; FileNotFoundError where there is none.
    """
    for _ in range(OPENINGS):
        held = Descriptor(folder / MANIFEST)
        data = held.read(0, os.fstat(held.number).st_size)
        if build and build_of(data) != build:
            held = Descriptor(next(folder.glob(retired_name(build, "*")), folder / retired_name(build, 0)))
            data = held.read(0, os.fstat(held.number).st_size)
        locked = True
        with suppress(OSError):  # a file system without locks
            locked = held.lock(fcntl.LOCK_SH | fcntl.LOCK_NB)
        if locked and os.fstat(held.number).st_nlink:
            return held, data
        time.sleep(0.02)  # it was retired and removed between the calls
    raise OSError("another process holds its lock")


assert [*ShardRows.__dataclass_fields__] == [*PLACES, "keys"]
