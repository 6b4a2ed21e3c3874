"""Counts what a builder or an index leaves out, by kind, with an example."""

import logging
from dataclasses import dataclass, field

from mug.data.errors import printable

MAX_KINDS = 20  # counted separately; file names may have any number of extensions
OTHERS = "files of further kinds"

log = logging.getLogger("mug")


@dataclass
class LeftOut:
    """What was left out. kinds: kind of thing → how many, and the first. True if there are any."""

    kinds: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, kind: str, first: str, count: int = 1) -> None:
        """Count `count` things of a kind."""
        if kind not in self.kinds and len(self.kinds) >= MAX_KINDS:
            kind = OTHERS
        before, example = self.kinds.get(kind, (0, first))
        self.kinds[kind] = before + count, example

    def merge(self, other: "LeftOut", where: str = "") -> None:
        """Add the counts of another one, with `where` after its examples."""
        for kind, (count, first) in other.kinds.items():
            self.add(kind, first + where, count)

    def report(self, where: object) -> None:
        """Log a line, if there is something to report."""
        if self.kinds:
            log.warning("%s: left out %s", where, self)

    @property
    def count(self) -> int:
        """Returns the number of things of all kinds."""
        return sum(count for count, _ in self.kinds.values())

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def __str__(self) -> str:
        kinds = self.kinds.items()
        return printable("; ".join(f"{count:,} {kind}, the first {first}" for kind, (count, first) in kinds))
