"""A key of its own for each sample of a set, where those that the source gives are not."""

import itertools
import logging

from mug.data.errors import printable

log = logging.getLogger("mug")


class OwnKeys:
    """Gives each sample a key of its own: one that came before gets a number, with a warning."""

    def __init__(self):
        self.seen: set[str] = set()
        self.twice = 0

    def own(self, key: str, source: object) -> str:
        """Returns `key`, or `key` and a number; `source` is where it was found, for the warning."""
        numbered = (f"{key}_{i}" for i in itertools.count(2))
        own = next(one for one in itertools.chain([key], numbered) if one not in self.seen)
        self.seen.add(own)
        if own != key:
            self.twice += 1
            if self.twice.bit_count() == 1:  # at 1, 2, 4, 8, …
                line = "%d samples have a key that came before, and get a number; the latest: '%s' has key '%s'"
                log.warning(line, self.twice, printable(str(source)), own)
        return own
