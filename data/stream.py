"""The stream of batches that training reads."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from mug.data.bad_samples import Replacement
from mug.data.errors import DataError
from mug.data.kinds.samples import Batch, Samples
from mug.data.loader import load
from mug.data.order import SampleOrder
from mug.data.tokenizer import Tokenizer

STATE_VERSION = 2


@dataclass(frozen=True)
class BatchShard:
    """One rank's part of each global batch: each R-th position, cut into micro-batches in order.

    Position p lies in lane p mod L of the order, so a rank stays in the same lanes where R divides L, and what is
    read from them may be cached on its machine.

    groups: equal runs of consecutive positions in a global batch. The samples of a group are of one kind and may see
        each other; a micro-batch lies in one group, and all ranks take part in each.
    """

    global_batch: int
    micro_batch: int
    rank: int
    world: int
    groups: int = 1

    def __post_init__(self):
        parts = self.groups * self.micro_batch * self.world
        if min(self.global_batch, self.micro_batch, self.groups) < 1 or self.global_batch % parts:
            groups = "" if self.groups == 1 else f"{self.groups} groups x "
            raise DataError(
                f"global batch {self.global_batch} is not divisible by {groups}micro batch {self.micro_batch} x "
                f"{self.world} ranks: change one of them"
            )

    @property
    def group(self) -> int:
        """Samples in a group, over all ranks."""
        return self.global_batch // self.groups

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in a group."""
        return self.group // (self.micro_batch * self.world)

    def positions(self, start: int) -> list[range]:
        """Returns the positions of this rank's micro-batches in the global batch that begins at `start`."""
        mine = range(start + self.rank, start + self.global_batch, self.world)
        return [mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)]


class TrainStream:
    """Iterates over this rank's micro-batches, one list per optimizer step, without end.

    What it yields depends on the data's state and on `share`, never on the number of workers. The state moves
    only by `advance()`, which the trainer calls after each optimizer step; a new iteration begins there.
    """

    def __init__(self, source: Samples, share: BatchShard, workers: int):
        if source.order is None:
            raise ValueError("these samples have no order to train in")
        self.source = source
        self.order: SampleOrder = source.order
        self.share = share
        self.workers = workers
        self.next_position = 0
        self.skipped: list[list[int]] = []  # [first, end): positions that were passed over, in order
        self._yielded: deque[list[Replacement]] = deque()  # of each step that was yielded and not trained on
        self._replaced: list[Replacement] = []

    @property
    def samples(self) -> int:
        """Samples in an epoch."""
        return len(self.order)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the texts, None where there are none."""
        return self.source.tokenizer

    @property
    def epoch(self) -> int:
        """The epoch of the next sample."""
        return self.next_position // self.samples

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield, per optimizer step, this rank's micro-batches: see the kind of `source`.

        Raises:
            DataError: a shard cannot be read; it is named.
        """
        self._yielded.clear()
        loaded = load(self.source, self._positions(self.next_position), self.workers)
        per_step = len(self.share.positions(0))
        while True:
            batches, replaced = zip(*(next(loaded) for _ in range(per_step)), strict=True)
            self._yielded.append([entry for entries in replaced for entry in entries])
            yield list(batches)

    def _positions(self, start: int) -> Iterator[range]:
        while True:
            yield from self.share.positions(start)
            start += self.share.global_batch

    def advance(self) -> None:
        """Count one global batch as trained on."""
        self.next_position += self.share.global_batch
        self._replaced += self._yielded.popleft()

    def skip(self) -> None:
        """Pass over one global batch that was not trained on, and remember it."""
        first = self.next_position
        self.advance()
        self.skipped.append([first, self.next_position])

    def take_replacements(self) -> list[Replacement]:
        """Returns this rank's samples that could not be used, of the steps trained on since the last call."""
        taken, self._replaced = self._replaced, []
        return taken

    def state_dict(self) -> dict:
        """Returns the data's state: the same on every rank and for any number of ranks."""
        place = {"epoch": self.epoch, "next_position": self.next_position, "skipped": [*self.skipped]}
        return self._identity() | place

    def _identity(self) -> dict:
        """Returns what must agree for a saved position to mean the same sample."""
        return {
            "version": STATE_VERSION,
            "seed": self.order.seed,
            "samples": self.samples,
            **self.order.constants(),
            **self.source.identity(),
        }

    def load_state_dict(self, state: dict, allow_changes: bool = False) -> None:
        """Resume where `state` was saved. allow_changes: of what a mixture is made of; one stream stays as it was.

        Raises:
            DataError: it was saved by another version, or over another seed, index or tokenizer.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise DataError(
                    f"the checkpoint's data has {name} {state.get(name)}, this run's has {mine}: resume with "
                    "the same shards, tokenizer and seed, or start a new run"
                )
        self.next_position = int(state["next_position"])
        self.skipped = [list(positions) for positions in state["skipped"]]
