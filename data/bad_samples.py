"""The samples that could not be used and were replaced: one JSON line each, and a limit on their share."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mug.data.errors import DataError

FREE = 16  # bad samples, overall or in one shard, below which no limit applies: a share of few samples means little

log = logging.getLogger("mug")


@dataclass(frozen=True, order=True)
class Replacement:
    """A sample that could not be used, and why. Another one of its shard took its place in the order.

    epoch: that of its stream. shard_samples: number of samples in its shard.
    """

    position: int
    shard: str
    key: str
    reason: str
    shard_samples: int
    epoch: int


class BadSampleLog:
    """The lines of FILE in the order of positions, of which a checkpoint keeps the number and a running SHA-256.

    One process writes it, whatever the number of ranks.
    """

    def __init__(self, file: Path, limit: float, shard_limit: float):
        """`limit` is the share of all samples so far, `shard_limit` that of one shard in one epoch."""
        self.file = file
        self.limit = limit
        self.shard_limit = shard_limit
        self.entries = 0
        self.digest = hashlib.sha256(b"").hexdigest()
        self.in_shard: Counter[tuple[int, str]] = Counter()  # (epoch, shard) → bad samples

    def add(self, replaced: Iterable[Replacement], next_position: int) -> None:
        """Append the entries of the positions since the last time and before `next_position`.

        Raises:
            DataError: there are more than the limits allow; they are written nevertheless.
        """
        entries = sorted(replaced)
        if not entries:
            return
        before = self.entries
        with self.file.open("a", encoding="utf-8") as file:
            for entry in entries:
                file.write(self._count(json.dumps(asdict(entry))) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self.entries.bit_length() > before.bit_length():  # at 1, 2, 4, 8, …
            log.warning("%d samples could not be used so far and were replaced; %s lists them", self.entries, self.file)
        self._check(entries, next_position)

    def _count(self, line: str) -> str:
        entry = json.loads(line)
        self.entries += 1
        self.digest = hashlib.sha256(bytes.fromhex(self.digest) + line.encode()).hexdigest()
        self.in_shard[entry["epoch"], entry["shard"]] += 1
        return line

    def _check(self, entries: list[Replacement], next_position: int) -> None:
        last = entries[-1]
        if self.entries > FREE + self.limit * next_position:
            raise DataError(
                f"{self.entries} of {next_position:,} samples could not be used, more than data.max_bad_fraction"
                f" {self.limit} allows; {self.file} lists them, the last: shard '{last.shard}', key '{last.key}':"
                f" {last.reason}"
            )
        for entry in entries:
            bad = self.in_shard[entry.epoch, entry.shard]
            if bad > FREE + self.shard_limit * entry.shard_samples:
                raise DataError(
                    f"shard '{entry.shard}': {bad} of {entry.shard_samples:,} samples could not be used, more than"
                    f" data.max_bad_fraction_in_shard {self.shard_limit} allows; {self.file} lists them, the last: key"
                    f" '{entry.key}': {entry.reason}"
                )

    def state_dict(self) -> dict:
        """Returns the number of entries, and the running SHA-256 over them."""
        return {"entries": self.entries, "sha256": self.digest}

    def load_state_dict(self, state: dict) -> None:
        """Resume after the entries that `state` counts. Later ones are dropped: they will be written again.

        A file that does not hold those entries is set aside, with a warning.
        """
        lines = self.file.read_text(encoding="utf-8").splitlines()[: state["entries"]] if self.file.exists() else []
        try:
            for line in lines:
                self._count(line)
            agrees = self.state_dict() == state
        except (ValueError, KeyError, TypeError):
            agrees = False
        if not agrees:
            log.warning("%s does not hold the checkpoint's %d entries: it is set aside", self.file, state["entries"])
            if self.file.exists():
                os.replace(self.file, self.file.with_suffix(".aside.jsonl"))
            self.in_shard.clear()
            self.entries, self.digest, lines = state["entries"], state["sha256"], []
        if lines or self.file.exists():
            fresh = self.file.with_suffix(".fresh")
            fresh.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            os.replace(fresh, self.file)
