"""Batches of positions, read and decoded by worker processes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from mug.data.bad_samples import Replacement
from mug.data.errors import DataError
from mug.data.kinds.samples import Batch, Samples
from mug.data.workers import batches_of, worker_settings


@dataclass(frozen=True, eq=False)
class _Batches(Dataset):
    """Positions → batch and what was replaced. Errors of one line are returned: raised, a traceback hides the line."""

    samples: Samples

    def __getitem__(self, index: Sequence[int]) -> tuple[Batch, list[Replacement]] | Exception:
        try:
            return self.samples.batch(index)
        except (DataError, OSError) as error:
            return error


def load(samples: Samples, batches: Iterable[Sequence[int]], workers: int) -> Iterator[tuple[Batch, list[Replacement]]]:
    """Yields the batches of these positions, in order, whatever the number of worker processes; 0 works in this one.

    Raises:
        DataError: see the `batch` of these samples; or a worker has ended, with the reason.
        OSError: a file cannot be read.
    """
    loader = DataLoader(
        _Batches(samples),
        batch_size=None,  # the sampler gives complete batches
        sampler=batches,
        **worker_settings(workers),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or it would draw from, and move, the global one
    )
    for loaded in batches_of(loader):
        if isinstance(loaded, Exception):
            raise loaded
        yield loaded
