"""The bytes of a sample: from its row of the index, out of its shard."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from mug.data.captions import MAX_JSON, MAX_TEXT
from mug.data.config import TextConfig
from mug.data.decode import MAX_BYTES
from mug.data.errors import BadSample
from mug.data.index.build import index_for
from mug.data.index.columnar import Groups
from mug.data.index.index import Index
from mug.data.index.rows import IMAGE, JSON, PARTS, TEXT
from mug.data.index.tar import BLOCK, is_header, is_header_of
from mug.data.order import spread
from mug.data.store.fetch import Fetch
from mug.data.store.identity import Identity

GROUPED = ("parquet", "arrow_batches")  # formats whose samples are rows of a group that is read as a unit
Parts = tuple[bytes, bytes, bytes]  # image, text and json of a sample, empty where it has none

NEAR = 16 * 2**10  # bytes between two parts of a sample that are better read than skipped


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads samples by shard and row. Cheap to pickle, for the processes that work with it."""

    index: Index
    fetch: Fetch
    identity: Identity
    groups: Groups
    _unnamed: set[int] = field(default_factory=set)  # tars whose headers do not hold the names of their files

    @staticmethod
    def open(patterns: str | list[str], config: TextConfig, images_needed: bool = True) -> "Reader":
        """Opens the shards that `patterns` name (see `DataConfig.shards`), indexed if they are not yet.

        Raises:
            DataError: a shard is missing or cannot be used, or holds no images where they are needed.
        """
        return Reader.of(index_for(patterns, config.cache_folder(), config.caption, images_needed), config)

    @staticmethod
    def of(index: Index, config: TextConfig) -> "Reader":
        """Opens the shards of an open index."""
        cache, identity = config.cache_folder() / "shards", Identity(index)
        fetch = Fetch(index.urls, index.sizes, index.etags, cache, config, identity)
        return Reader(index, fetch, identity, Groups(caption=index.caption))

    def spread(self, wanted: int) -> Iterator[tuple[int, int]]:
        """Returns shard and row of at most `wanted` samples, spread evenly over all."""
        starts_S1 = self.index.starts_S1
        for number in spread(len(self.index), wanted):
            shard = int(starts_S1.searchsorted(number, side="right")) - 1
            yield shard, number - int(starts_S1[shard])

    def ahead(self, places: Sequence[tuple[int, int]], parts: tuple[str, ...] = PARTS) -> Iterator[Callable[[], Parts]]:
        """Yields for each shard and row a function that returns what `read` does; remote ones are prefetched."""
        return self.fetch.ahead([shard for shard, _ in places], lambda i: self.read(*places[i], parts))

    def read(self, shard: int, row: int, parts: tuple[str, ...] = PARTS) -> Parts:
        """Returns the bytes of a sample, those parts that are not named being empty.

        Raises:
            BadSample: the image is larger than any that is decoded.
            DataError: the shard cannot be read, or is not the one that was indexed.
        """
        return self._read(shard, row, parts)

    def read_texts(self, shard: int, row: int) -> tuple[bytes, bytes]:
        """Returns the text and json of a sample, empty where it has none; its image may be of any size.

        Raises:
            DataError: the shard cannot be read, or is not the one that was indexed.
        """
        return self._read(shard, row, ("text", "json"))[1:]

    def read_json(self, shard: int, row: int) -> bytes:
        """Returns only the json of a sample, empty where it has none.

        Raises:
            DataError: the shard cannot be read, or is not the one that was indexed.
        """
        return self._read(shard, row, ("json",))[2]

    def _read(self, shard: int, row: int, parts: tuple[str, ...]) -> Parts:
        """Returns those parts of a sample, the others empty."""
        rows = self.index.rows(shard)
        places = [
            (int(getattr(rows, f"{part}_offset")[row]), int(getattr(rows, f"{part}_length")[row]))
            if part in parts
            else (0, -1)
            for part in PARTS
        ]
        if self.index.formats[shard] not in GROUPED:
            image, text, meta = self._read_spans(shard, row, places)
            return image, text, meta
        path = self.fetch.local(shard)
        image, text, meta = (
            self.groups.read(path, part, *place) if place[1] >= 0 else b""
            for part, place in zip((IMAGE, TEXT, JSON), places, strict=True)
        )
        return image, text, meta

    def _read_spans(self, shard: int, row: int, places: list[tuple[int, int]]) -> list[bytes]:
        """Returns the bytes at each (offset, length), -1 for none: in one read where they are adjacent, as in a tar.

        In a tar each is read with its header, which shows whether the file is still the one that was indexed.
        """
        if places[IMAGE][1] > MAX_BYTES:
            raise BadSample(f"an image of {places[IMAGE][1]:,} bytes is more than {MAX_BYTES:,}")
        header = BLOCK if self.index.formats[shard] == "tar" else 0
        spans = [
            (offset - header, offset + min(length, limit)) if length >= (0 if header else 1) else (0, 0)
            for (offset, length), limit in zip(places, (MAX_BYTES, MAX_TEXT, MAX_JSON + 1), strict=True)
        ]
        present = [span for span in spans if span[1]]
        if not present:
            return [b""] * len(places)
        begin, end = min(b for b, _ in present), max(e for _, e in present)
        if end - begin <= sum(e - b for b, e in present) + NEAR:
            data = self.fetch.read(shard, begin, end - begin)
            pieces = [data[max(b - begin, 0) : max(e - begin, 0)] for b, e in spans]
        else:
            pieces = [self.fetch.read(shard, b, e - b) if e else b"" for b, e in spans]
        if not header:
            return pieces
        key = self.index.key(shard, row)
        for piece, (offset, length) in zip(pieces, places, strict=True):
            if piece:
                self._check_header(shard, key, piece[:header], offset, length)
        return [piece[header:] for piece in pieces]

    def _check_header(self, shard: int, key: str, header: bytes, offset: int, length: int) -> None:
        if shard in self._unnamed:
            if is_header(header):
                return
        elif is_header_of(header, key, length):
            return
        elif self.identity.is_same_tar(shard, partial(self.fetch.read, shard)):
            self._unnamed.add(shard)
            return
        raise self.fetch.changed(shard, f"at byte {offset:,} is not the file of '{key}'")
