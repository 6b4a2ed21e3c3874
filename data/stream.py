"""Pairs by position, and the stream of batches that training reads."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from mug.data import rng
from mug.data.config import DataConfig
from mug.data.crops import CROP_DRAWS, CentralSquare, RandomCrop
from mug.data.decode import decode_crop
from mug.data.errors import BadSample, DataError
from mug.data.openmoji import ensure_openmoji
from mug.data.order import Order
from mug.data.shards import IMAGE, ShardIndex, expand
from mug.data.tokenizer import Tokenizer

Batch = dict[str, torch.Tensor]

STATE_VERSION = 1


@dataclass(frozen=True)
class Augment:
    """How training sees a sample: its order, random crop and flip."""

    order: Order
    crop_scale: tuple[float, float]
    flip: bool

    def crop(self, epoch: int, position: int) -> RandomCrop:
        """The random crop of the image at this position."""
        seed = self.order.seed
        draws = rng.uniform(seed, rng.CROP, epoch, position, CROP_DRAWS)
        flip = self.flip and rng.uniform(seed, rng.FLIP, epoch, position, 1)[0] < 0.5
        return RandomCrop(self.crop_scale, draws, flip)


@dataclass(frozen=True, eq=False)
class Pairs(Dataset):
    """position → {"image": uint8 [3, S, S], "tokens": int64 [T], "position": int64 []}.

    With `augment`, the training view: positions run on over epochs without end. Without it, the evaluation
    view: a position is the sample's place in the shards, the image its central square.
    """

    index: ShardIndex
    tokenizer: Tokenizer
    image_size: int
    text_length: int
    language: str
    augment: Augment | None = None

    def __post_init__(self):
        if self.text_length < 3:
            raise DataError(f"text length {self.text_length} leaves no room between BOS and EOS: give 3 or more")

    def __len__(self) -> int:
        """Number of samples N, which is one epoch."""
        return len(self.index)

    def __getitem__(self, position: int) -> Batch:
        """The sample at `position`.

        Raises:
            DataError: it cannot be read or decoded; names the shard and the key.
            IndexError: beyond the last sample, in the evaluation view.
        """
        position = int(position)
        if position < 0 or (self.augment is None and position >= len(self)):
            raise IndexError(position)
        epoch, row = self.augment.order.locate(position) if self.augment else (0, position)
        crop = self.augment.crop(epoch, position) if self.augment else CentralSquare()
        try:
            view = decode_crop(self.index.read(row, IMAGE), self.image_size, crop)
        except BadSample as error:
            raise BadSample(f"{self.index.name(row)}: the image cannot be decoded: {error}") from error
        tokens = self.tokenizer.encode(self.index.caption(row, self.language), self.text_length)
        return {
            "image": torch.from_numpy(view),
            "tokens": torch.from_numpy(tokens),
            "position": torch.tensor(position, dtype=torch.int64),
        }


@dataclass(frozen=True)
class Share:
    """What one rank takes of each global batch: a contiguous slice, cut into micro-batches in order."""

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
        per_rank = self.global_batch // self.world
        first = start + self.rank * per_rank
        return [range(i, i + self.micro_batch) for i in range(first, first + per_rank, self.micro_batch)]


@dataclass(frozen=True, eq=False)
class MicroBatches(Dataset):
    """range of positions → collated batch. A DataError is returned: raised, a worker buries its one line."""

    pairs: Pairs

    def __getitem__(self, positions: range) -> Batch | DataError:
        try:
            samples = [self.pairs[position] for position in positions]
        except DataError as error:
            return error
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def worker_settings(workers: int) -> dict:
    """What a DataLoader needs to run `workers` processes beside a training process.

    That one runs CUDA, NCCL and OpenMP threads, and a plain fork may copy their locks as held: hence the fork
    server. Workers import the script that was started, so it must begin its work under `if __name__ == "__main__"`.
    """
    if not workers:
        return {"num_workers": 0}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not once per worker
    return {
        "num_workers": workers,
        "multiprocessing_context": context,
        "worker_init_fn": _end_with_parent,
    }


def _end_with_parent(worker: int) -> None:
    """Watch for the end of the training process. torch watches the parent's id, which is the fork server's."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class TrainStream:
    """This rank's micro-batches, one list per optimizer step, without end.

    What it yields depends on the data's state and on `share`, never on the number of workers. The state moves
    only by `advance()`, which the trainer calls after each optimizer step; iterating anew begins there.
    """

    def __init__(self, pairs: Pairs, share: Share, workers: int):
        self.pairs = pairs
        self.share = share
        self.workers = workers
        self.fingerprint = pairs.index.fingerprint()
        self.next_position = 0

    @property
    def samples(self) -> int:
        """Number of samples in an epoch."""
        return len(self.pairs)

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
            DataError: a sample cannot be used; names the shard and the key.
        """
        loader = iter(self._loader(self._positions(self.next_position)))
        per_step = len(self.share.positions(0))
        while True:
            step = [next(loader) for _ in range(per_step)]
            for batch in step:
                if isinstance(batch, DataError):
                    raise batch
            yield step

    def _positions(self, start: int) -> Iterator[range]:
        while True:
            yield from self.share.positions(start)
            start += self.share.global_batch

    def _loader(self, positions: Iterator[range]) -> DataLoader:
        return DataLoader(
            MicroBatches(self.pairs),
            batch_size=None,  # the sampler names whole micro-batches
            sampler=positions,
            **worker_settings(self.workers),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or it would draw from, and move, the global one
        )

    def advance(self) -> None:
        """Count one global batch as trained on."""
        self.next_position += self.share.global_batch

    def state_dict(self) -> dict:
        """The data's state: the same on every rank and for any number of ranks."""
        return self._identity() | {"epoch": self.epoch, "next_position": self.next_position}

    def _identity(self) -> dict:
        """What must agree for a saved position to mean the same sample."""
        return {
            "version": STATE_VERSION,
            "seed": self.pairs.augment.order.seed,
            "samples": self.samples,
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
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


def _tokenizer(config: DataConfig, embedded: Path | None) -> Tokenizer:
    if config.tokenizer is None and embedded is None:
        raise DataError("data.shards is given without data.tokenizer: name a tokenizer.json or a hub tokenizer")
    return Tokenizer.load(config.tokenizer or embedded)


def open_train(config: DataConfig, seed: int, image_size: int, text_length: int, share: Share) -> TrainStream:
    """The training stream of one rank; builds the embedded pairs where no shards are given.

    `seed` sets the order of the samples, the crops and the flips.

    Raises:
        DataError: shards or tokenizer are missing or damaged.
    """
    embedded = ensure_openmoji(config.cache_folder()) if config.shards is None else None
    paths = expand(config.shards) if embedded is None else sorted(embedded.glob("train-*.tar"))
    tokenizer = _tokenizer(config, embedded)
    index = ShardIndex.scan(paths)
    augment = Augment(Order(len(index), seed), tuple(config.crop_scale), config.flip)
    pairs = Pairs(index, tokenizer, image_size, text_length, config.language, augment)
    return TrainStream(pairs, share, config.workers)


def open_held_out(config: DataConfig, image_size: int, text_length: int) -> Pairs | None:
    """The evaluation view of the held-out pairs, in the order of the shards; None where there are none.

    Raises:
        DataError: shards or tokenizer are missing or damaged.
    """
    if config.shards is not None and config.held_out is None:
        return None
    embedded = ensure_openmoji(config.cache_folder()) if config.shards is None else None
    paths = expand(config.held_out) if config.held_out is not None else sorted(embedded.glob("held_out-*.tar"))
    tokenizer = _tokenizer(config, embedded)
    return Pairs(ShardIndex.scan(paths), tokenizer, image_size, text_length, config.language)
