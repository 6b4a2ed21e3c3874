"""The index of a data set: for every sample of every shard, where its image, caption and json lie.

A folder holds `manifest.arrow`, one row a shard, and one `NNNNN.arrow` a shard, one row a sample; all are Arrow IPC
files, and a shard's rows are read through a memory map. So opening an index costs one small file, whatever the
number of samples. `mug.data.build` writes it.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from mug.data.errors import DataError
from mug.data.remote import shown
from mug.data.rows import PLACES

VERSION = "1"  # of the files' layout and of what their columns mean
MANIFEST = "manifest.arrow"
FORMATS = ("tar", "arrow", "arrow_batches", "parquet")
OPEN_SHARDS = 1024  # mapped at a time; a map needs no open file


def rows_name(shard: int) -> str:
    return f"{shard:05d}.arrow"


@dataclass(frozen=True, eq=False)
class ShardRows:
    """The N samples of one shard, as columns in a memory map.

    `image_offset`, `image_length` and the same of `text` and `json`, int64 [N]: the place in bytes in the shard's
    file, the length -1 where there is none. In a shard of format 'arrow_batches' or 'parquet' the offset is a record
    batch or row group, the length a row in it (see `mug.data.columnar.Groups`).
    key_hash: uint64 [N], FNV-1a of the key. width, height: int32 [N], 0 where the first bytes do not tell.
    format: uint8 [N], a place in `sniff.FORMATS`. flags: uint16 [N], bits of `sniff`.
    """

    image_offset: np.ndarray
    image_length: np.ndarray
    text_offset: np.ndarray
    text_length: np.ndarray
    json_offset: np.ndarray
    json_length: np.ndarray
    key_hash: np.ndarray
    width: np.ndarray
    height: np.ndarray
    format: np.ndarray
    flags: np.ndarray
    keys: pa.StringArray

    def __len__(self) -> int:
        return len(self.keys)


class Index:
    """The shards of a data set and the way to their rows. Cheap to open and to pickle.

    urls, formats, etags: list [S] of strings. sizes: int64 [S], bytes. counts_S: int64 [S], samples of each shard.
    starts_S1: int64 [S+1], number of each shard's first sample, and of all samples. fingerprint: SHA-256 over the
    shards' names, sizes and formats and their samples' keys and places, wherever the shards and the index lie.
    """

    def __init__(self, folder: Path, manifest: pa.Table):
        self.folder = folder
        self.urls: list[str] = manifest["url"].to_pylist()
        self.formats: list[str] = manifest["format"].to_pylist()
        self.etags: list[str] = manifest["etag"].to_pylist()
        self.sizes = manifest["size"].to_numpy()
        self.counts_S = manifest["count"].to_numpy()
        self.starts_S1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts_S)])
        self.fingerprint = manifest.schema.metadata[b"fingerprint"].decode()
        self._digests: list[str] = manifest["digest"].to_pylist()
        self.rows = lru_cache(OPEN_SHARDS)(self._read_rows)

    @staticmethod
    def open(folder: Path | str) -> "Index":
        """The index in `folder`.

        Raises:
            DataError: it is missing, unfinished, damaged, or of another version.
        """
        folder = Path(folder)
        mend = "write it by run/index_shards.py"
        try:
            with pa.memory_map(str(folder / MANIFEST)) as file:
                manifest = pa.ipc.open_file(file).read_all()
            version = manifest.schema.metadata[b"version"].decode()
        except FileNotFoundError as error:
            raise DataError(f"no finished index in '{folder}': {mend}") from error
        except (OSError, pa.ArrowException, TypeError, KeyError) as error:
            raise DataError(f"index '{folder}': its {MANIFEST} is damaged ({error}): {mend}") from error
        if version != VERSION:
            raise DataError(f"index '{folder}' is of version {version}, and this is version {VERSION}: {mend}")
        return Index(folder, manifest)

    def __reduce__(self):
        return Index.open, (self.folder,)

    def __len__(self) -> int:
        """Number of samples N."""
        return int(self.starts_S1[-1])

    def _read_rows(self, shard: int) -> ShardRows:
        """The rows of a shard, 0 to S-1, kept open for the next call.

        Raises:
            DataError: they are missing, damaged, or not those the manifest was written for.
        """
        path = self.folder / rows_name(shard)
        try:
            with pa.memory_map(str(path)) as file:
                batch = pa.ipc.open_file(file).get_batch(0)
            if batch.schema.metadata[b"digest"].decode() != self._digests[shard]:
                raise DataError(f"index '{path}' is not of one build with its {MANIFEST}: write the index anew")
            columns = {name: batch[name].to_numpy() for name in batch.schema.names if name != "key"}
            return ShardRows(**columns, keys=batch["key"])
        except (OSError, pa.ArrowException, KeyError, TypeError) as error:
            raise DataError(f"index '{path}' cannot be read ({error}): write the index anew") from error

    def key(self, shard: int, row: int) -> str:
        """A sample's key."""
        return self.rows(shard).keys[row].as_py()

    def name(self, shard: int, row: int) -> str:
        """What to call a sample in a message: its shard and key."""
        return f"shard '{shown(self.urls[shard])}', key '{self.key(shard, row)}'"


assert {*ShardRows.__dataclass_fields__} >= {*PLACES}
