"""Checks of one rank's machine before a run: versions, data, memory, disk, network, GPU."""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from mug.data.kinds.samples import Samples
from mug.data.stream import BatchShard, TrainStream
from mug.model.objectives.objective import Objective
from mug.run.cluster import hardware
from mug.run.common.errors import in_one_line, user_errors
from mug.run.common.rank_env import interface_problem
from mug.run.common.source_digest import OURS, digest, folders_beside
from mug.run.state.restore import build_objective
from mug.run.training.deepspeed_config import offloads
from mug.run.training.recipe import Command, Recipe
from mug.run.training.start import open_stream, shape_of

PACKAGES = ("torch", "deepspeed", "numpy", "timm", "tokenizers", "safetensors", "pillow", "simplejpeg")
# Weights and AdamW's two moments, fp32, as a checkpoint holds them.
CHECKPOINT_BYTES = 12
SHARED_MEMORY = Path("/dev/shm")
PREFETCHED = 2  # batches that a worker keeps ready, the default of PyTorch's DataLoader


@dataclass(frozen=True)
class CheckResult:
    """The result of a check on one rank: a value to show, and what is wrong, with the fix."""

    check: str
    value: str
    problem: str | None = None


def check_node(command: Command, ds_config: dict[str, Any], rank: int, world: int) -> list[CheckResult]:
    """Returns the results of all checks of one rank; one that fails does not keep the others from running."""
    findings = [versions(), code(), recipe(command, ds_config)]
    trainer = command.recipe.trainer
    share = BatchShard(trainer.global_batch, trainer.micro_batch, rank, world, trainer.groups)
    try:
        stream = open_stream(command.recipe, share)
    except user_errors() as error:
        findings.append(CheckResult("index", "not open", in_one_line(error)))
    else:
        model = objective_without_memory(command.recipe, stream.source)
        findings += [index(stream), memory(model, ds_config, world), disk(command, model)]
        findings.append(shared_memory(command.recipe, int(os.environ["LOCAL_SIZE"])))
    return [*findings, network(), gpu()]


def versions() -> CheckResult:
    named = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    if torch.cuda.is_available():
        named |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return CheckResult("versions", ", ".join(f"{name} {version}" for name, version in named.items()))


def code() -> CheckResult:
    """A digest of this package's sources: hosts may hold different checkouts."""
    return CheckResult("code", digest(folders_beside(OURS))[:12])


def recipe(command: Command, ds_config: dict[str, Any]) -> CheckResult:
    text = json.dumps([asdict(command.recipe), ds_config, str(command.output)], sort_keys=True, default=str)
    return CheckResult("recipe", hashlib.sha256(text.encode()).hexdigest()[:12])


def index(stream: TrainStream) -> CheckResult:
    fingerprint = stream.state_dict()["fingerprint"]
    return CheckResult("index", f"{stream.samples:,} {stream.source.kind}, fingerprint {fingerprint[:12]}")


def objective_without_memory(recipe: Recipe, source: Samples) -> Objective:
    with torch.device("meta"):
        return build_objective(recipe.objective, recipe.model, recipe.context(source))


def memory(model: nn.Module, ds_config: dict[str, Any], world: int) -> CheckResult:
    """Check DeepSpeed's estimate of weights, gradients and optimizer state; activations come on top."""
    on_host, on_device = model_state_bytes(model, ds_config.get("zero_optimization", {}), world)
    local = int(os.environ["LOCAL_SIZE"])
    available = psutil.virtual_memory().available
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(hardware.device()).total_memory
        value = (
            f"{on_device / 1e9:.2f} of {total / 1e9:.1f} GB on the GPU, {on_host / 1e9:.2f} of {available / 1e9:.1f}"
        )
        fits = on_device < total and on_host < available
    else:
        needed = on_host + on_device * local
        value = f"{needed / 1e9:.2f} of {available / 1e9:.1f}"
        fits = needed < available
    problem = "weights and optimizer do not fit: more ranks, a higher ZeRO stage, or offload (docs/deepspeed.md)"
    return CheckResult("memory", f"{value} GB on the host, before activations", None if fits else problem)


def model_state_bytes(model: nn.Module, zero: dict[str, Any], world: int) -> tuple[int, int]:
    """Returns bytes on a host and on each of its devices, by DeepSpeed's estimators."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    local = int(os.environ["LOCAL_SIZE"])
    total = sum(p.numel() for p in model.parameters())
    offload, stage = offloads(zero, "offload_optimizer"), zero.get("stage", 0)
    if stage < 3:  # without ZeRO each device holds what the only device of a run would
        devices, hosts = (local, max(1, world // local)) if stage else (1, 1)
        return estimate_zero2_model_states_mem_needs(total, devices, hosts, cpu_offload=offload)
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    weights = offloads(zero, "offload_param")
    return estimate_zero3_model_states_mem_needs(
        total, largest, local, max(1, world // local), cpu_offload=offload, cpu_offload_params=weights, zero_init=False
    )[:2]


def disk(command: Command, model: nn.Module) -> CheckResult:
    """Check the disk space for the checkpoints that are kept, also for replay, and the one that is being written."""
    faults = command.recipe.faults
    count = command.recipe.checkpoint.keep + 1 + (faults.max_skips if faults.nonfinite == "skip" else 0)
    needed = count * CHECKPOINT_BYTES * sum(p.numel() for p in model.parameters())
    folder, there = existing_folder(command.output), _checkpoint_bytes(command.output)
    free = shutil.disk_usage(folder).free + there
    value = f"{needed / 1e9:.2f} GB for checkpoints, {free / 1e9:.1f} GB free at {folder}"
    value += f", with {there / 1e9:.2f} GB of checkpoints that new ones replace" if there else ""
    short = f"too little space at {folder}: free disk space, lower checkpoint.keep, or choose another --output"
    return CheckResult("disk", value, short if needed > free else None)


def _checkpoint_bytes(output: Path) -> int:
    """Returns the bytes of this run's checkpoints, also unfinished ones: the run removes them as it continues."""
    kinds = (output.glob("checkpoint-*[0-9]/*"), output.glob("checkpoint-*.partial/*"))
    return sum(path.stat().st_size for paths in kinds for path in paths)


def shared_memory(recipe: Recipe, ranks: int) -> CheckResult:
    """Check the space for batches that the loaders of a host's `ranks` prefetch; too little kills workers by SIGBUS."""
    shape = shape_of(recipe)
    crops = max(1, len(shape.views))
    sample = crops * 3 * shape.image_size**2 + 8 * (shape.text_length or 0) + 8  # pixels, tokens, position
    loaders = 2 if recipe.evals else 1  # that of training waits, full, while held-out samples are read
    batches = recipe.workers * PREFETCHED * loaders
    needed = batches * recipe.trainer.micro_batch * sample * ranks
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    value = f"{needed / 1e9:.2f} GB for loaders, {free / 1e9:.2f} GB free at {SHARED_MEMORY}"
    size = f"--shm-size={math.ceil(needed / 2**30)}g"
    short = f"too little {SHARED_MEMORY}: start the container with {size} (or --ipc=host), or lower data.workers"
    return CheckResult("shared memory", value, short if needed > free else None)


def existing_folder(path: Path) -> Path:
    """Returns the first folder that exists, of `path` and its parents."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def network() -> CheckResult:
    """Check the network interface towards rank 0, and those that gloo and NCCL are set to use."""
    interfaces = {address.address: name for name, addresses in psutil.net_if_addrs().items() for address in addresses}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        mine = probe.getsockname()[0]
    name = interfaces.get(mine, "?")
    speed = psutil.net_if_stats()[name].speed if name in psutil.net_if_stats() else 0
    value = f"{name}, {mine}" + (f", {speed} Mbit/s" if speed else "")
    return CheckResult("network", value, _network_problem(set(interfaces.values()), name, mine))


def _network_problem(interfaces: set[str], name: str, mine: str) -> str | None:
    if problem := interface_problem(interfaces):
        return problem
    if not torch.cuda.is_available() and not os.environ.get("GLOO_SOCKET_IFNAME") and not mine.startswith("127."):
        host = socket.gethostname()
        if (resolved := _resolve(host)).startswith("127."):
            return f"{host} is {resolved} here, which gloo would give to the others; set GLOO_SOCKET_IFNAME={name}"
    return None


def _resolve(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


# What nvidia-smi is asked, and which answers are fine; a GPU that does not know answers [N/A].
GPU_QUESTIONS: dict[str, Callable[[str], bool]] = {
    "name": lambda answer: True,
    "temperature.gpu": lambda answer: not answer.isdigit() or int(answer) < 90,
    "ecc.errors.uncorrected.volatile.total": lambda answer: answer in ("0", "[N/A]"),
    "remapped_rows.pending": lambda answer: answer in ("0", "No", "[N/A]"),
    "remapped_rows.failure": lambda answer: answer in ("0", "No", "[N/A]"),
    "clocks_throttle_reasons.hw_slowdown": lambda answer: answer in ("Not Active", "[N/A]"),
}


def gpu() -> CheckResult:
    """Check what the driver reports of this rank's GPU."""
    if not torch.cuda.is_available():
        return CheckResult("gpu", "none; ranks work on CPUs")
    uuid = torch.cuda.get_device_properties(hardware.device()).uuid
    ask = ["nvidia-smi", "-i", f"GPU-{uuid}", f"--query-gpu={','.join(GPU_QUESTIONS)}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(
            ask, capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return CheckResult("gpu", torch.cuda.get_device_name(), f"nvidia-smi does not answer: {error}")
    return check_gpu(output)


def check_gpu(output: str) -> CheckResult:
    """Returns the result for one CSV line of answers to GPU_QUESTIONS."""
    answers = dict(zip(GPU_QUESTIONS, (part.strip() for part in output.strip().split(",")), strict=True))
    bad = [f"{name} {answer}" for name, answer in answers.items() if not GPU_QUESTIONS[name](answer)]
    problem = f"{', '.join(bad)}: take this GPU out of the run, or reset it" if bad else None
    return CheckResult("gpu", f"{answers['name']}, {answers['temperature.gpu']} °C", problem)
