"""Batches of positions, read and decoded by processes beside the training process."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker

import torch
from torch.utils.data import DataLoader, Dataset

from mug.data.errors import DataError
from mug.data.ledger import Replaced
from mug.data.pairs import Batch, Pairs


@dataclass(frozen=True, eq=False)
class _Batches(Dataset):
    """Positions → batch and what was replaced. A DataError is returned: raised, a worker buries its one line."""

    pairs: Pairs

    def __getitem__(self, positions: Sequence[int]) -> tuple[Batch, list[Replaced]] | DataError:
        try:
            return self.pairs.batch(positions)
        except DataError as error:
            return error


def load(pairs: Pairs, batches: Iterable[Sequence[int]], workers: int) -> Iterator[tuple[Batch, list[Replaced]]]:
    """The batches of these positions, in order, whatever the number of worker processes; 0 works in this one.

    Raises:
        DataError: see `Pairs.batch`.
    """
    loader = DataLoader(
        _Batches(pairs),
        batch_size=None,  # the sampler names whole batches
        sampler=batches,
        **worker_settings(workers),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or it would draw from, and move, the global one
    )
    for loaded in loader:
        if isinstance(loaded, DataError):
            raise loaded
        yield loaded


def worker_settings(workers: int) -> dict:
    """What a DataLoader needs to run `workers` processes beside a training process.

    That one runs CUDA, NCCL and OpenMP threads, and a plain fork may copy their locks as held: hence the fork
    server. Workers import the script that was started, so it must begin its work under `if __name__ == "__main__"`.
    """
    if not workers:
        return {"num_workers": 0}
    start_fork_server()
    return {
        "num_workers": workers,
        "multiprocessing_context": multiprocessing.get_context("forkserver"),
        "worker_init_fn": _end_with_parent,
    }


def start_fork_server() -> None:
    """Start it, if it is not there; it takes seconds to be ready, and this does not wait for it.

    It imports once what each worker would, this project's modules that the training process has imported by now. It is
    deaf to the signals that ask a whole job to end, and so will the workers be: the training process answers them when
    its step is done, and needs its workers till then.
    """
    forkserver.set_forkserver_preload([name for name in sys.modules if name.startswith("mug.")])
    resource_tracker.ensure_running()  # the fork server wants it, and starting it unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(worker: int) -> None:
    """Watch for the end of the training process. torch watches the parent's id, which is the fork server's."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
