"""The rendezvous of a run's ranks before there is a process group, and which of them are missing."""

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta

from torch.distributed import DistError, DistNetworkError, PrefixStore, Store, TCPStore

from mug.run.common.errors import RankLocalError, RunError
from mug.run.common.rank_env import duration

MARGIN = 10.0  # seconds for TCPStore to see by itself that its time is up


def rendezvous_timeout() -> timedelta:
    """Returns how long ranks wait for each other at the start: $MUG_RENDEZVOUS_SECONDS, else five minutes.

    Hosts start within seconds of each other, but a cold file system can take minutes to import PyTorch.

    Raises:
        RunError: the variable is not a duration.
    """
    return duration("MUG_RENDEZVOUS_SECONDS", default=300)


def rendezvous(rank: int, world: int) -> Store:
    """Returns the key-value store at MASTER_ADDR:MASTER_PORT, once all ranks are there.

    Raises:
        RunError: the port is taken, or ranks are missing; on rank 0.
        RankLocalError: rank 0 cannot be reached, or gave up, or it is not rank 0 that listens there; on another rank.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    store = _open_store(rank, world, place)
    store.set(f"host of {rank}", socket.gethostname())
    if rank == 0:
        _wait_for_all(store, world, place)
        store.set("all are here", "")
        return store
    try:
        store.wait(["all are here"], 2 * rendezvous_timeout())  # rank 0 may have started that much later
    except DistError:
        raise RankLocalError(f"rank 0 at {place} never reported that all ranks are there; see its output") from None
    return store


def _open_store(rank: int, world: int, place: str) -> Store:
    address, port = place.rsplit(":", 1)
    # torchrun's agent serves the store itself, the same one after a restart.
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    serves = rank == 0 and not agents
    try:
        store = _in_time(
            lambda: TCPStore(address, int(port), world, serves, rendezvous_timeout(), wait_for_workers=False)
        )
    except DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise RunError(
                f"port {port} of {socket.gethostname()} is in use, maybe by another run; choose another"
                " (--master_port of the launcher)"
            ) from None
        raise RankLocalError(_unreachable(rank, place)) from None
    except (DistError, TimeoutError):
        raise RankLocalError(_unreachable(rank, place)) from None
    return PrefixStore(f"mug, attempt {attempt}", store)


def _in_time(connect: Callable[[], Store]) -> Store:
    """Return or raise what `connect()` does; TimeoutError if it does neither.

    A program that accepts the connection and sends nothing holds TCPStore for ever, whatever its timeout. The thread
    that waits for it is left behind: its process is about to end.
    """
    connected: Future[Store] = Future()

    def attempt() -> None:
        try:
            connected.set_result(connect())
        except Exception as error:
            connected.set_exception(error)

    threading.Thread(target=attempt, daemon=True).start()
    return connected.result(rendezvous_timeout().total_seconds() + MARGIN)


def _unreachable(rank: int, place: str) -> str:
    return (
        f"rank {rank} on {socket.gethostname()} cannot reach {place}; is MASTER_ADDR (--master_addr) an address of the"
        " first host that the others can reach, is rank 0 running, and is MASTER_PORT (--master_port) taken by another"
        " program there?"
    )


def _wait_for_all(store: Store, world: int, place: str) -> None:
    keys = [f"host of {rank}" for rank in range(world)]
    try:
        store.wait(keys, rendezvous_timeout())
    except DistError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        here = {store.get(key).decode() for rank, key in enumerate(keys) if rank not in missing}
        raise RunError(
            f"rank(s) {', '.join(map(str, missing))} of {world} did not reach the rendezvous at {place} within"
            f" {rendezvous_timeout().total_seconds():.0f} s; present: ranks on {', '.join(sorted(here))}: can the other"
            " hosts be reached, and does the program start there?"
        ) from None
