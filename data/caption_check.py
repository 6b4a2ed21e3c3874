"""Checks that samples have readable captions: counts as they are read, or looks at a few before a run begins."""

from mug.data.captions import LOST, captions
from mug.data.errors import BadSample
from mug.data.reader import Reader
from mug.data.store.remote import is_remote

LOOKED_AT = 64  # samples, spread over the shards
FETCHED = 4  # of them at most, for which something has to come from a store


class CaptionReader:
    """Reads the captions of samples and counts what is wrong with them.

    read, captioned: samples so far, and those of them that have a caption.
    """

    def __init__(self, reader: Reader, languages: tuple[str, ...]):
        self.reader = reader
        self.languages = languages
        self.read = self.captioned = 0
        self.examples: dict[str, list[str]] = {}  # kind → samples

    def captions(self, shard: int, row: int) -> list[str]:
        """Returns the captions of a sample, in the order of the languages; none if it has none or a damaged json.

        Raises:
            DataError: the shard cannot be read.
        """
        self.read += 1
        try:
            found = captions(*self.reader.read_texts(shard, row), self.languages)
        except BadSample as error:
            found = []
            self._count("damaged", f"{self.reader.index.name(shard, row)}: {error}")
        self.captioned += bool(found)
        if any(LOST in caption for caption in found):
            self._count("undecoded", self.reader.index.name(shard, row))
        return found

    def _count(self, kind: str, example: str) -> None:
        self.examples.setdefault(kind, []).append(example)

    def warnings(self) -> list[str]:
        """Returns a warning for each kind of problem: how many samples have it, which is the first, and what to do."""
        lines = []
        if 2 * self.captioned < self.read:
            seen = self.reader.index.seen
            there = f"the shards have {seen}" if seen else "rerun run/index_shards.py, which looks for more names"
            few = f"only {self.captioned:,}" if self.captioned else "none"
            lines.append(
                f"{few} of {self.read:,} samples read have a caption; {there}: set data.caption to the column or"
                " extension that holds them"
            )
        if samples := self.examples.get("undecoded"):
            lines.append(
                f"{len(samples):,} of {self.captioned:,} captions read are not UTF-8, and have lost letters: convert"
                f" them; the first: {samples[0]}"
            )
        if samples := self.examples.get("damaged"):
            lines.append(f"{len(samples):,} of {self.read:,} samples read are unusable; the first: {samples[0]}")
        return lines


def caption_warnings(reader: Reader, languages: tuple[str, ...]) -> list[str]:
    """Returns the problems that `CaptionReader` finds in LOOKED_AT samples.

    Of those in a store, it is enough to have a .txt; few others are fetched.

    Raises:
        DataError: a shard cannot be read.
    """
    looked, fetched = CaptionReader(reader, languages), 0
    for shard, row in reader.spread(LOOKED_AT):
        remote = is_remote(reader.index.urls[shard])
        has_text = reader.index.rows(shard).text_length[row] > 0
        if remote and (has_text or fetched == FETCHED):
            looked.read += 1
            looked.captioned += bool(has_text)
        else:
            fetched += remote
            looked.captions(shard, row)
    return looked.warnings()
