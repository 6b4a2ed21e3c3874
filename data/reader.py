"""The bytes of a sample: from its row of the index, out of its shard."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mug.data.build import index_for
from mug.data.captions import MAX_JSON, MAX_TEXT
from mug.data.columnar import Groups
from mug.data.config import DataConfig
from mug.data.decode import MAX_BYTES
from mug.data.errors import BadSample
from mug.data.fetch import Fetch
from mug.data.index import Index
from mug.data.rows import IMAGE, JSON, TEXT

GROUPED = ("parquet", "arrow_batches")  # formats whose samples are rows of a group that is read as a whole
Parts = tuple[bytes, bytes, bytes]  # image, text and json of a sample, empty where it has none

NEAR = 16 * 2**10  # bytes between two parts of a sample that are better read than stepped over


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads samples by shard and row. Cheap to pickle, for the processes that work with it."""

    index: Index
    fetch: Fetch
    groups: Groups = field(default_factory=Groups)

    @staticmethod
    def open(patterns: str, config: DataConfig) -> "Reader":
        """The shards that `patterns` name (see `DataConfig.shards`), indexed if they are not yet.

        Raises:
            DataError: a shard is missing or cannot be used.
        """
        index = index_for(patterns, config.cache_folder())
        return Reader(index, Fetch(index.urls, index.sizes, index.etags, config.cache_folder() / "shards", config))

    def spread(self, most: int) -> Iterator[tuple[int, int]]:
        """Shard and row of at most `most` samples, spread evenly over all."""
        total, starts_S1 = len(self.index), self.index.starts_S1
        for i in range(min(most, total)):
            number = i * total // min(most, total)
            shard = int(starts_S1.searchsorted(number, side="right")) - 1
            yield shard, number - int(starts_S1[shard])

    def ahead(self, places: Sequence[tuple[int, int]]) -> Iterator[Callable[[], Parts]]:
        """For each shard and row a function that returns what `read` does; remote ones come in meanwhile."""
        return self.fetch.ahead([shard for shard, _ in places], lambda i: self.read(*places[i]))

    def read(self, shard: int, row: int) -> Parts:
        """The bytes of a sample.

        Raises:
            BadSample: the image is larger than any that is decoded.
            DataError: the shard cannot be read, or is not the one that was indexed.
        """
        rows = self.index.rows(shard)
        places = [
            (int(rows.image_offset[row]), int(rows.image_length[row])),
            (int(rows.text_offset[row]), int(rows.text_length[row])),
            (int(rows.json_offset[row]), int(rows.json_length[row])),
        ]
        if self.index.formats[shard] in GROUPED:
            path = self.fetch.local(shard)
            image, text, meta = (
                self.groups.read(path, part, *place) if place[1] >= 0 else b""
                for part, place in zip((IMAGE, TEXT, JSON), places, strict=True)
            )
        else:
            image, text, meta = self._read_spans(shard, places)
        return image, text, meta

    def read_json(self, shard: int, row: int) -> bytes:
        """The json of a sample alone, empty where it has none.

        Raises:
            DataError: the shard cannot be read, or is not the one that was indexed.
        """
        rows = self.index.rows(shard)
        offset, length = int(rows.json_offset[row]), int(rows.json_length[row])
        if length < 0:
            return b""
        if self.index.formats[shard] in GROUPED:
            return self.groups.read(self.fetch.local(shard), JSON, offset, length)
        return self.fetch.read(shard, offset, min(length, MAX_JSON + 1))

    def _read_spans(self, shard: int, places: list[tuple[int, int]]) -> list[bytes]:
        """The bytes at each (offset, length): in one read where they lie side by side, as in a tar they do."""
        if places[IMAGE][1] > MAX_BYTES:
            raise BadSample(f"an image of {places[IMAGE][1]:,} bytes is more than {MAX_BYTES:,}")
        places = [(o, min(n, most)) for (o, n), most in zip(places, (MAX_BYTES, MAX_TEXT, MAX_JSON + 1), strict=True)]
        present = [(offset, offset + length) for offset, length in places if length > 0]
        begin, end = min(b for b, _ in present), max(e for _, e in present)
        if end - begin <= sum(e - b for b, e in present) + NEAR:
            data = self.fetch.read(shard, begin, end - begin)
            return [data[max(o - begin, 0) : max(o - begin, 0) + max(n, 0)] for o, n in places]
        return [self.fetch.read(shard, offset, length) if length > 0 else b"" for offset, length in places]
