"""Ranks, cores and devices: the hardware that the run uses."""

import copy
import os
import resource
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed import Store

from mug.run.cluster.rendezvous import rendezvous
from mug.run.common.errors import RankLocalError, ReportedByRankZero, in_one_line, user_errors
from mug.run.common.rank_env import interface_problem, take_place

# Dense bf16 FLOP/s by the vendors' data sheets; the longest name that fits counts.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def rank_and_world() -> tuple[int, int]:
    """Returns this rank and the world size; without a launcher, rank 0 of 1.

    Raises:
        RankLocalError: see `take_place`.
    """
    place = take_place()
    return place.rank, place.world


def limit_threads() -> None:
    """Share the cores of a CPU machine among its ranks, unless the user has set OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_SIZE"])))


def init_distributed(timeout: timedelta = timedelta(minutes=30)) -> None:
    """Start the process group, and give it to DeepSpeed. Calls that take longer than `timeout` fail."""
    import deepspeed

    # An operator for inference on CPUs that training never calls: building it takes a compiler and a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    use_device()
    rank, world = rank_and_world()
    start_process_group(rendezvous(rank, world), timeout)
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout)


def start_process_group(store: Store, timeout: timedelta) -> None:
    """NCCL on GPUs, gloo on CPUs, among the ranks that have met in `store`; calls longer than `timeout` fail."""
    rank, world = rank_and_world()
    if problem := interface_problem(psutil.net_if_addrs()):
        raise RankLocalError(problem)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def use_device() -> None:
    """Select this rank's GPU, where there is one; a thread that does not select one works on the first."""
    if torch.cuda.is_available():
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise RankLocalError(
                f"LOCAL_RANK is {local_rank}, but PyTorch sees {torch.cuda.device_count()} GPU(s): start fewer ranks"
                " on this host, or check CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(local_rank)


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def is_bf16(precision: str) -> bool:
    """Whether `trainer.precision` means bf16 on this machine: "auto" does on GPUs."""
    return precision == "bf16" or (precision == "auto" and torch.cuda.is_available())


def wait_for_device() -> None:
    """Wait until all work queued on the device is done; a CPU has none."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def to_device(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the batch on this rank's device; a GPU copies from pinned memory, and the host does not wait."""
    tensors = copy.copy(batch)  # which keeps a batch's kind
    if torch.cuda.is_available():
        tensors |= {name: tensor.pin_memory().to(device(), non_blocking=True) for name, tensor in batch.items()}
    return tensors


def describe_device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} thread(s)"


def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of this rank's device, None where it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    fits = [key for key in PEAK_FLOPS if key in name]
    return PEAK_FLOPS[max(fits, key=len)] if fits else None


def peak_memory_gb() -> float:
    """Returns the peak memory of this rank: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def gather(mine: list[Any]) -> list[Any]:
    """Returns the lists of all ranks, concatenated."""
    parts: list[list[Any]] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def on_rank_zero(ask: Callable[[], Any]) -> Any:
    """Returns on all ranks what `ask()` returns on rank 0; if it raises, all ranks end with its message."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer = [ask(), None]
        except user_errors() as error:
            if isinstance(error, OSError):
                traceback.print_exc()  # into the log
            answer = [None, in_one_line(error)]
        except Exception as error:
            dist.broadcast_object_list([None, repr(error)], src=0)
            raise
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise ReportedByRankZero(answer[1])
    return answer[0]
