"""What one rank finds out about its machine before a run: versions, data, memory, disk, network, GPU."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mug.data
import mug.kernels
import mug.model
import mug.run
from mug.data.stream import Share, TrainStream, open_train
from mug.model.mug import OBJECTIVES
from mug.model.presets import Vocabulary
from mug.run.training import hardware
from mug.run.training.errors import user_errors
from mug.run.training.recipe import Command

PACKAGES = ("torch", "deepspeed", "numpy", "timm", "tokenizers", "safetensors", "pillow", "simplejpeg")
# Weights and AdamW's two moments, fp32, as a checkpoint holds them.
CHECKPOINT_BYTES = 12


@dataclass(frozen=True)
class Finding:
    """What a check found on one rank: a value to show, and what is wrong, with the mend."""

    check: str
    value: str
    problem: str | None = None


def survey(command: Command, ds_config: dict[str, Any], rank: int, world: int) -> list[Finding]:
    """All that a rank can find out alone; a check that fails does not keep the others from running."""
    findings = [versions(), code(), recipe(command, ds_config)]
    share = Share(command.recipe.trainer.global_batch, command.recipe.trainer.micro_batch, rank, world)
    sizes = command.recipe.model.image_size, command.recipe.model.text_length
    try:
        stream = open_train(command.recipe.data, command.recipe.seed, *sizes, share)
    except user_errors() as error:
        findings.append(Finding("index", "not open", str(error)))
    else:
        model = objective_without_memory(command, stream)
        findings += [index(stream), memory(model, ds_config, world), disk(command, model)]
    return [*findings, network(), gpu()]


def versions() -> Finding:
    named = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    if torch.cuda.is_available():
        named |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return Finding("versions", ", ".join(f"{name} {version}" for name, version in named.items()))


def code() -> Finding:
    """A digest of this package's sources: hosts may hold different checkouts."""
    digest = hashlib.sha256()
    for package in (mug.data, mug.kernels, mug.model, mug.run):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return Finding("code", digest.hexdigest()[:12])


def recipe(command: Command, ds_config: dict[str, Any]) -> Finding:
    text = json.dumps([asdict(command.recipe), ds_config, str(command.output)], sort_keys=True, default=str)
    return Finding("recipe", hashlib.sha256(text.encode()).hexdigest()[:12])


def index(stream: TrainStream) -> Finding:
    fingerprint = stream.state_dict()["fingerprint"]
    return Finding("index", f"{stream.samples:,} pairs, fingerprint {fingerprint[:12]}")


def objective_without_memory(command: Command, stream: TrainStream) -> nn.Module:
    t = stream.tokenizer
    vocabulary = Vocabulary(size=t.vocab_size, pad=t.pad, bos=t.bos, eos=t.eos, mask=t.mask)
    with torch.device("meta"):
        return OBJECTIVES[command.recipe.objective](command.recipe.model, vocabulary, command.recipe.seed)


def memory(model: nn.Module, ds_config: dict[str, Any], world: int) -> Finding:
    """DeepSpeed's estimate of weights, gradients and optimizer state; activations come on top."""
    on_host, on_device = model_state_bytes(model, ds_config.get("zero_optimization", {}), world)
    local = int(os.environ["LOCAL_SIZE"])
    available = _host_memory()
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
    return Finding("memory", f"{value} GB on the host, before activations", None if fits else problem)


def model_state_bytes(model: nn.Module, zero: dict[str, Any], world: int) -> tuple[int, int]:
    """Bytes on a host and on each of its devices, by DeepSpeed's estimators."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    local = int(os.environ["LOCAL_SIZE"])
    total = sum(p.numel() for p in model.parameters())
    offload, stage = _offloads(zero, "offload_optimizer"), zero.get("stage", 0)
    if stage < 3:  # without ZeRO each device holds what the only device of a run would
        devices, hosts = (local, max(1, world // local)) if stage else (1, 1)
        return estimate_zero2_model_states_mem_needs(total, devices, hosts, cpu_offload=offload)
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    weights = _offloads(zero, "offload_param")
    return estimate_zero3_model_states_mem_needs(
        total, largest, local, max(1, world // local), cpu_offload=offload, cpu_offload_params=weights, zero_init=False
    )[:2]


def _offloads(zero: dict[str, Any], section: str) -> bool:
    return (zero.get(section) or {}).get("device", "none") != "none"


def _host_memory() -> int:
    """Bytes that new processes can have without swapping: proc(5)'s MemAvailable."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def disk(command: Command, model: nn.Module) -> Finding:
    """Room for the checkpoints that are kept, also for replay, and the one that is being written."""
    safety = command.recipe.safety
    count = command.recipe.checkpoint.keep + 1 + (safety.max_skips if safety.nonfinite == "skip" else 0)
    needed = count * CHECKPOINT_BYTES * sum(p.numel() for p in model.parameters())
    folder = existing_folder(command.output)
    free = shutil.disk_usage(folder).free
    value = f"{needed / 1e9:.2f} GB for checkpoints, {free / 1e9:.1f} GB free at {folder}"
    short = f"too little room at {folder}: make room, lower checkpoint.keep, or name another --output"
    return Finding("disk", value, short if needed > free else None)


def existing_folder(path: Path) -> Path:
    """The folder that is there, of `path` and those above it."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def network() -> Finding:
    """The interface on the way to rank 0, and those that gloo and NCCL are told to take."""
    import psutil  # DeepSpeed needs it, too

    interfaces = {address.address: name for name, addresses in psutil.net_if_addrs().items() for address in addresses}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        mine = probe.getsockname()[0]
    name = interfaces.get(mine, "?")
    speed = psutil.net_if_stats()[name].speed if name in psutil.net_if_stats() else 0
    value = f"{name}, {mine}" + (f", {speed} Mbit/s" if speed else "")
    return Finding("network", value, _network_problem(set(interfaces.values()), name, mine))


def _network_problem(interfaces: set[str], name: str, mine: str) -> str | None:
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if lacking := [one for one in wanted.split(",") if one and one not in interfaces]:
        return f"GLOO_SOCKET_IFNAME names {', '.join(lacking)}; here are {', '.join(sorted(interfaces))}"
    wanted = os.environ.get("NCCL_SOCKET_IFNAME", "")
    prefixes = tuple(part for part in wanted.removeprefix("=").split(",") if part)
    if prefixes and not wanted.startswith("^") and not any(one.startswith(prefixes) for one in interfaces):
        return f"NCCL_SOCKET_IFNAME is {wanted}; here are {', '.join(sorted(interfaces))}"
    if not torch.cuda.is_available() and not os.environ.get("GLOO_SOCKET_IFNAME") and not mine.startswith("127."):
        host = socket.gethostname()
        if (resolved := _resolve(host)).startswith("127."):
            return f"{host} is {resolved} here, which gloo would tell the others; set GLOO_SOCKET_IFNAME={name}"
    return None


def _resolve(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


# What nvidia-smi is asked, and which answers are no problem; a GPU that does not know answers [N/A].
GPU_QUESTIONS: dict[str, Callable[[str], bool]] = {
    "name": lambda answer: True,
    "temperature.gpu": lambda answer: not answer.isdigit() or int(answer) < 90,
    "ecc.errors.uncorrected.volatile.total": lambda answer: answer in ("0", "[N/A]"),
    "remapped_rows.pending": lambda answer: answer in ("0", "No", "[N/A]"),
    "remapped_rows.failure": lambda answer: answer in ("0", "No", "[N/A]"),
    "clocks_throttle_reasons.hw_slowdown": lambda answer: answer in ("Not Active", "[N/A]"),
}


def gpu() -> Finding:
    """What the driver says of this rank's GPU."""
    if not torch.cuda.is_available():
        return Finding("gpu", "none; ranks work on CPUs")
    uuid = torch.cuda.get_device_properties(hardware.device()).uuid
    ask = ["nvidia-smi", "-i", f"GPU-{uuid}", f"--query-gpu={','.join(GPU_QUESTIONS)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("gpu", torch.cuda.get_device_name(), f"nvidia-smi does not answer: {error}")
    return judge_gpu(said)


def judge_gpu(said: str) -> Finding:
    """The finding from one CSV line of answers to GPU_QUESTIONS."""
    answers = dict(zip(GPU_QUESTIONS, (part.strip() for part in said.strip().split(",")), strict=True))
    bad = [f"{name} {answer}" for name, answer in answers.items() if not GPU_QUESTIONS[name](answer)]
    problem = f"{', '.join(bad)}: take this GPU out of the run, or reset it" if bad else None
    return Finding("gpu", f"{answers['name']}, {answers['temperature.gpu']} °C", problem)
