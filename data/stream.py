"""The stream of batches that training reads, and the pairs that it is evaluated on."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mug.data.config import DataConfig
from mug.data.errors import DataError
from mug.data.ledger import Replaced
from mug.data.loader import load, start_fork_server
from mug.data.openmoji import ensure_openmoji
from mug.data.order import Order
from mug.data.pairs import Batch, EvaluationView, Pairs, TrainView
from mug.data.reader import Reader
from mug.data.tokenizer import Tokenizer

STATE_VERSION = 2


@dataclass(frozen=True)
class Share:
    """What one of R ranks takes of each global batch: each R-th position, cut into micro-batches in order.

    Position p lies in lane p mod L of the order, so a rank stays in the same lanes where R divides L, and what is
    read from them may be cached on its machine.
    """

    global_batch: int
    micro_batch: int
    rank: int
    world: int

    def __post_init__(self):
        if min(self.global_batch, self.micro_batch) < 1 or self.global_batch % (self.micro_batch * self.world):
            raise DataError(
                f"global batch {self.global_batch} is not divisible by micro batch {self.micro_batch} x "
                f"{self.world} ranks: change one of them"
            )

    def positions(self, start: int) -> list[range]:
        """The positions of this rank's micro-batches in the global batch that begins at `start`."""
        mine = range(start + self.rank, start + self.global_batch, self.world)
        return [mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)]


class TrainStream:
    """This rank's micro-batches, one list per optimizer step, without end.

    What it yields depends on the data's state and on `share`, never on the number of workers. The state moves
    only by `advance()`, which the trainer calls after each optimizer step; iterating anew begins there.
    """

    def __init__(self, pairs: Pairs, share: Share, workers: int):
        self.pairs = pairs
        self.order: Order = pairs.view.order
        self.share = share
        self.workers = workers
        self.next_position = 0
        self.skipped: list[list[int]] = []  # [first, end): positions that were passed over, in order
        self._yielded: deque[list[Replaced]] = deque()  # of each step that was yielded and not trained on
        self._replaced: list[Replaced] = []

    @property
    def samples(self) -> int:
        """Number of samples in an epoch."""
        return len(self.order)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the captions."""
        return self.pairs.tokenizer

    @property
    def epoch(self) -> int:
        """The epoch of the next sample."""
        return self.next_position // self.samples

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield, per optimizer step, this rank's micro-batches of `image`, `tokens` and `position`.

        Raises:
            DataError: a shard cannot be read; it is named.
        """
        self._yielded.clear()
        loaded = load(self.pairs, self._positions(self.next_position), self.workers)
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

    def take_replaced(self) -> list[Replaced]:
        """This rank's samples that could not be used, of the steps trained on since the last call."""
        taken, self._replaced = self._replaced, []
        return taken

    def state_dict(self) -> dict:
        """The data's state: the same on every rank and for any number of ranks."""
        place = {"epoch": self.epoch, "next_position": self.next_position, "skipped": [*self.skipped]}
        return self._identity() | place

    def _identity(self) -> dict:
        """What must agree for a saved position to mean the same sample."""
        return {
            "version": STATE_VERSION,
            "seed": self.order.seed,
            "samples": self.samples,
            **self.order.constants(),
            **self.pairs.identity(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was saved.

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


def open_train(config: DataConfig, seed: int, image_size: int, text_length: int, share: Share) -> TrainStream:
    """The training stream of one rank; builds the embedded pairs where no shards are given.

    `seed` sets the order of the samples, the crops, the flips and the choice among captions.

    Raises:
        DataError: shards or tokenizer are missing or damaged.
    """
    if config.workers:
        start_fork_server()
    embedded = ensure_openmoji(config.cache_folder()) if config.shards is None else None
    reader = Reader.open(config.shards if embedded is None else f"{embedded}/train-*.tar", config)
    view = TrainView(Order(reader.index.counts_S, seed), tuple(config.crop_scale), config.flip)
    return TrainStream(_pairs(config, reader, embedded, image_size, text_length, view), share, config.workers)


def open_held_out(config: DataConfig, image_size: int, text_length: int) -> Pairs | None:
    """The evaluation view of the held-out pairs, in the order of the shards; None where there are none.

    Raises:
        DataError: shards or tokenizer are missing or damaged.
    """
    if config.shards is not None and config.held_out is None:
        return None
    embedded = ensure_openmoji(config.cache_folder()) if config.shards is None else None
    reader = Reader.open(config.held_out if config.held_out is not None else f"{embedded}/held_out-*.tar", config)
    return _pairs(config, reader, embedded, image_size, text_length, EvaluationView(reader.index.counts_S))


def _pairs(config: DataConfig, reader: Reader, embedded: Path | None, image_size: int, text_length: int, view) -> Pairs:
    if config.tokenizer is None and embedded is None:
        raise DataError("data.shards is given without data.tokenizer: name a tokenizer.json or a hub tokenizer")
    tokenizer = Tokenizer.load(config.tokenizer or embedded)
    return Pairs(reader, tokenizer, image_size, text_length, config.languages(), config.decode, view)
