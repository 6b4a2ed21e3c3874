"""Where the ranks of a run meet before there is a process group, and which of them have not come."""

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta

from torch.distributed import DistError, DistNetworkError, PrefixStore, Store, TCPStore

from mug.run.training.errors import RunError, SaidByThisRank

MARGIN = 10.0  # seconds for TCPStore to see by itself that its time is up


def patience() -> timedelta:
    """How long ranks wait for each other at the start: $MUG_PATIENCE_SECONDS, else five minutes.

    Hosts start within seconds of each other, but a cold file system can take minutes to import PyTorch.
    """
    return timedelta(seconds=float(os.environ.get("MUG_PATIENCE_SECONDS", 300)))


def meet(rank: int, world: int) -> Store:
    """The key-value store at MASTER_ADDR:MASTER_PORT, once all ranks are there.

    Raises:
        RunError: the port is taken, or ranks are missing; on rank 0.
        SaidByThisRank: rank 0 cannot be reached, or gave up, or it is not rank 0 that listens there; on another rank.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    store = _open_store(rank, world, place)
    store.set(f"host of {rank}", socket.gethostname())
    if rank == 0:
        _wait_for_all(store, world, place)
        store.set("all are here", "")
        return store
    try:
        store.wait(["all are here"], 2 * patience())  # rank 0 may have started that much later
    except DistError:
        raise SaidByThisRank(f"rank 0 at {place} never said that all ranks are there; see what it says") from None
    return store


def _open_store(rank: int, world: int, place: str) -> Store:
    address, port = place.rsplit(":", 1)
    # torchrun's agent serves the store itself, the same one after a restart.
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    serves = rank == 0 and not agents
    try:
        store = _in_time(lambda: TCPStore(address, int(port), world, serves, patience(), wait_for_workers=False))
    except DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise RunError(
                f"port {port} of {socket.gethostname()} is in use, maybe by another run; name another"
                " (--master_port of the launcher)"
            ) from None
        raise SaidByThisRank(_unreachable(rank, place)) from None
    except (DistError, TimeoutError):
        raise SaidByThisRank(_unreachable(rank, place)) from None
    return PrefixStore(f"mug, attempt {attempt}", store)


def _in_time(connect: Callable[[], Store]) -> Store:
    """What `connect()` returns or raises; TimeoutError if it does neither.

    A program that accepts the connection and says nothing holds TCPStore for ever, whatever its timeout. The thread
    that waits for it is left behind: its process is about to end.
    """
    connected: Future[Store] = Future()

    def attempt() -> None:
        try:
            connected.set_result(connect())
        except Exception as error:
            connected.set_exception(error)

    threading.Thread(target=attempt, daemon=True).start()
    return connected.result(patience().total_seconds() + MARGIN)


def _unreachable(rank: int, place: str) -> str:
    return (
        f"rank {rank} on {socket.gethostname()} cannot reach {place}; is MASTER_ADDR (--master_addr) an address of the"
        " first host that the others can reach, is rank 0 running, and is MASTER_PORT (--master_port) taken by another"
        " program there?"
    )


def _wait_for_all(store: Store, world: int, place: str) -> None:
    keys = [f"host of {rank}" for rank in range(world)]
    try:
        store.wait(keys, patience())
    except DistError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        here = {store.get(key).decode() for rank, key in enumerate(keys) if rank not in missing}
        raise RunError(
            f"rank(s) {', '.join(map(str, missing))} of {world} did not come to {place} within"
            f" {patience().total_seconds():.0f} s; here are ranks on {', '.join(sorted(here))}: can the other hosts be"
            " reached, and does the program start there?"
        ) from None
