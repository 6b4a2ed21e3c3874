"""This process's place among the ranks of a run, as its launcher set it in the environment.

torchrun and DeepSpeed's launcher set all of RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; Kubeflow's
PyTorchJob leaves out the local one, mpirun has variables of its own, and a shell may hold old ones.
"""

import contextlib
import os
import re
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import psutil

from mug.run.common.errors import RankLocalError, RunError

# Rank, world size, and the same on this host: of Open MPI; of MPICH, Intel MPI and what is built on them.
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
LOCALHOST, PORT = "127.0.0.1", 29500  # the defaults; the port is PyTorch's
SECONDS = {"": 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Place:
    """The rank and the world size, of the run and on this host."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def find_place(variables: Mapping[str, str]) -> Place:
    """Returns the place that the variables name; without any, rank 0 of 1.

    Raises:
        RankLocalError: they contradict each other or are incomplete.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not {"RANK", "WORLD_SIZE"} & variables.keys():
        names = next((mpi for mpi in MPI if mpi[0] in variables and mpi[1] in variables), names)
    rank, world = (_number(variables, name) for name in names[:2])
    if rank is None or world is None:
        if (rank or 0) > 0 or (world or 1) > 1:
            there, missing = (names[0], names[1]) if world is None else (names[1], names[0])
            raise RankLocalError(
                f"{there}={variables[there]} is set without {missing}: unset {there}, or start all ranks"
                " with a launcher"
            )
        rank, world = 0, 1
    local_rank, local_world = (_number(variables, name) for name in names[2:])
    if local_world is None:
        local_world = _number(variables, "LOCAL_SIZE")  # DeepSpeed's name
    # One process a host or pod, where a launcher names no local rank.
    place = Place(
        rank, world, local_rank or 0, local_world or (1 if local_rank is None else min(world, local_rank + 1))
    )
    if not 0 <= place.rank < place.world:
        raise RankLocalError(f"{names[0]}={rank} is not below {names[1]}={world}: unset both, or set them consistently")
    if not 0 <= place.local_rank < place.local_world:
        raise RankLocalError(
            f"{names[2]}={place.local_rank} is not below the {place.local_world} ranks of this host ({names[3]}): unset"
            " it, or set both consistently"
        )
    return place


def take_place() -> Place:
    """Return `find_place` of this process's environment, and set its variables and rank 0's address as torchrun would.

    Raises:
        RankLocalError: the variables do not name a place, or an address.
    """
    place = find_place(os.environ)
    host, port = os.environ.get("MASTER_ADDR"), _number(os.environ, "MASTER_PORT")
    if place.world == 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        host, port = LOCALHOST, free_port()
    if not host and place.local_world < place.world:
        raise RankLocalError(
            f"MASTER_ADDR is not set, but the {place.world} ranks are on several hosts: set it to the host of rank 0"
            " (mpirun -x MASTER_ADDR=HOST)"
        )
    if port is not None and not 0 < port < 1 << 16:
        raise RankLocalError(f"MASTER_PORT={port} is not a port: set a number between 1 and 65535")
    os.environ |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.world)}
    os.environ |= {"LOCAL_RANK": str(place.local_rank), "LOCAL_WORLD_SIZE": str(place.local_world)}
    os.environ |= {"MASTER_ADDR": host or LOCALHOST, "MASTER_PORT": str(port or PORT)}
    # DeepSpeed's name; without it, DeepSpeed starts a `numactl` at every reduction on a CPU.
    os.environ["LOCAL_SIZE"] = str(place.local_world)
    return place


def speaking_rank() -> int:
    """Returns the rank as which this process reports; where the variables name none, it reports for itself."""
    try:
        return find_place(os.environ).rank
    except RunError:
        return 0


def wait_for(speaker: str, seconds: float) -> bool:
    """Whether the rank that reports here (`speaker`: "rank" 0 or "local_rank" 0) has ended, after waiting for it.

    Ranks of a host are children of one process. A launcher ends all others when one has ended, so one that is silent
    must not be the first.
    """
    mine, deadline = find_place(os.environ), time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(place.world == mine.world and getattr(place, speaker) == 0 for place in _siblings()):
            return True
        time.sleep(0.1)
    return False


def _siblings() -> Iterator[Place]:
    """Yields the places of the other processes that this one's parent has started."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(os.getppid()).children():
            if process.pid != os.getpid():
                with contextlib.suppress(psutil.Error, RunError):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        yield find_place(process.environ())


def interface_problem(interfaces: Collection[str]) -> str | None:
    """Returns a warning if gloo or NCCL is set to use a network interface that this host does not have."""
    here = f"this host has {', '.join(sorted(interfaces))}"
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if lacking := [one for one in wanted.split(",") if one and one not in interfaces]:
        return f"GLOO_SOCKET_IFNAME names {', '.join(lacking)}; {here}"
    wanted = os.environ.get("NCCL_SOCKET_IFNAME", "")
    prefixes = tuple(part for part in wanted.removeprefix("=").split(",") if part)
    if prefixes and not wanted.startswith("^") and not any(one.startswith(prefixes) for one in interfaces):
        return f"NCCL_SOCKET_IFNAME is {wanted}; {here}"
    return None


def duration(name: str, default: float) -> timedelta:
    """Returns the duration of the variable `name`, in seconds or with a unit: 90, 90s, 5m, 1h.

    Raises:
        RunError: it is not such a duration.
    """
    text = os.environ.get(name, "").strip()
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([a-z]*)", text.lower())
    if not text:
        return timedelta(seconds=default)
    if not found or found[2] not in SECONDS or not 0 < float(found[1]) * SECONDS[found[2]] < 1e7:
        raise RunError(f"{name}={text} is not a duration: set seconds, or a number with s, m or h, such as 5m")
    return timedelta(seconds=float(found[1]) * SECONDS[found[2]])


def _number(variables: Mapping[str, str], name: str) -> int | None:
    """Returns the variable as a number; None where it is not set, or empty."""
    text = variables.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise RankLocalError(f"{name}={text} in the environment is not an integer: fix or unset it")
    return int(text)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return probe.getsockname()[1]
