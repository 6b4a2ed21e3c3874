"""Ranks of a process group for tests, each in a process of its own.

Their arguments are pickled by value: torch would share each tensor by a file descriptor, and multiprocessing's fork
server passes at most 256 of them.
"""

import json
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mug.run.cluster import hardware
from mug.run.common.rank_env import free_port


def run_ranks(work: Callable[..., None], world: int, *args: object) -> None:
    """Run `work(rank, world, *args)` in `world` processes that form a process group, which DeepSpeed knows.

    Raises:
        ProcessRaisedException: `work` raised on a rank; holds its traceback. The other ranks are terminated.
        ProcessExitedException: a rank was killed.
    """
    arguments = (world, free_port(), hardware.init_distributed, work, pickle.dumps((world, *args)), True)
    mp.spawn(_run, arguments, nprocs=world)


def run_gloo_ranks(world: int, function: Callable[..., None], *args: object) -> None:
    """Run `function(*args)` as `run_ranks` does, but without DeepSpeed, whose import takes seconds."""
    multiprocessing.set_forkserver_preload(["torch"])  # imported once, not by every rank
    arguments = (world, free_port(), _join_gloo, function, pickle.dumps(args), False)
    mp.start_processes(_run, arguments, nprocs=world, start_method="forkserver")


def found_by_ranks(world: int, find: Callable[[Path], dict], folder: Path) -> dict:
    """Returns what `find(folder)` returns on rank 0 of so many ranks, as JSON keeps it."""
    run_gloo_ranks(world, _write_found, find, folder)
    return json.loads((folder / f"found{world}.json").read_text(encoding="utf-8"))


def _write_found(find: Callable[[Path], dict], folder: Path) -> None:
    found = find(folder)
    if dist.get_rank() == 0:
        (folder / f"found{dist.get_world_size()}.json").write_text(json.dumps(found), encoding="utf-8")


def _join_gloo() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)


def _run(
    rank: int,
    world: int,
    port: int,
    join: Callable[[], None],
    work: Callable[..., None],
    pickled: bytes,
    ranked: bool,
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join()
    args = pickle.loads(pickled)
    work(*((rank, *args) if ranked else args))
    # A rank that leaves first closes connections, and rank 0 the store, which others may still use.
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # All has been checked. Python's shutdown would abort now and then, in a thread of gloo or of the store.
    os._exit(0)
