"""Ranks, cores and devices: what the run stands on."""

import os
import resource
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store

from mug.run.training.errors import SaidByRankZero, user_errors
from mug.run.training.rendezvous import meet

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
    """RANK and WORLD_SIZE as torchrun and the DeepSpeed launcher set them; alone, rank 0 of 1."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    if "RANK" not in os.environ:
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    # The DeepSpeed launcher sets LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE. Without the former, DeepSpeed starts a
    # `numactl` at every reduction on a CPU.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def use_cores() -> None:
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
    start_process_group(meet(rank, world), timeout)
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout)


def start_process_group(store: Store, timeout: timedelta) -> None:
    """NCCL on GPUs, gloo on CPUs, among the ranks that have met in `store`; calls longer than `timeout` fail."""
    rank, world = rank_and_world()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def use_device() -> None:
    """Work on this rank's GPU, where there is one; a thread that does not say so works on the first."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def wait_for_device() -> None:
    """Until all that was asked of the device is done; a CPU always is."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def to_device(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch on this rank's device; copies from pinned memory overlap with work there."""
    return {name: tensor.to(device(), non_blocking=True) for name, tensor in batch.items()}


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
    """Most memory that this rank has used: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def gather(mine: list[Any]) -> list[Any]:
    """The lists of all ranks, end to end."""
    parts: list[list[Any]] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def on_rank_zero(ask: Callable[[], Any]) -> Any:
    """What `ask()` returns on rank 0, on all ranks; if it raises, all ranks end with its words."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer = [ask(), None]
        except user_errors() as error:
            answer = [None, str(error)]
        except Exception as error:
            dist.broadcast_object_list([None, repr(error)], src=0)
            raise
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise SaidByRankZero(answer[1])
    return answer[0]
