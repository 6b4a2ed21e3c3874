"""Training steps of the full model on one device: images per second, MFU, and where the time goes.

The step is what the trainer's engine does on one GPU without DeepSpeed: bf16 weights and activations, AdamW and
clipping on fp32 copies (on a CPU: fp32 throughout). The batch is synthetic and stays on the device, so that nothing
waits for data.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mug.model.activation_checkpointing import activation_checkpointing
from mug.model.compiled import compile_blocks
from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Batch, Context
from mug.model.presets import resolve
from mug.run.benchmarks.kernel_timing import Ceilings
from mug.run.benchmarks.synthetic import VOCABULARY, WEIGHTS, synthetic_batch

WARM_UPS, PROFILED_STEPS = 3, 2
CLIPPING = 1.0
# Triton kernels of this project, by full names: "backward_kernel" is part of PyTorch's indexing_backward_kernel, too.
OURS = dict.fromkeys(("forward_kernel", "backward_kernel", "dq_kernel", "dkdv_kernel"), "attention")
OURS |= dict.fromkeys(("_loss_kernel", "_scale_kernel"), "losses")
# All others by parts of their names, on a GPU and on a CPU; the first group that fits counts.
GROUPS = {
    # cuDNN's and FlashAttention's backward begin and end with small kernels of their own.
    "attention": ("attention", "flash", "fmha", "sdpa", "convert_dq", "dot_do_o"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "matmul", "addmm", "::mm", "::bmm"),
    "losses": ("masked_patch_loss", "linear_cross_entropy", "log_softmax", "nll_loss"),
    "norms": ("layer_norm", "LayerNorm", "GammaBeta"),
    "optimizer": ("multi_tensor", "adam", "foreach", "lpnorm"),
    "activations": ("gelu", "Gelu"),
    "copies": ("copy", "Memcpy", "Memset", "CatArray", "::cat"),
    "gathers": ("index", "gather", "scatter", "sort", "Sort", "embedding"),
    "sums": ("reduce", "::sum", "sum_functor"),
    "element-wise": ("elementwise", "triton_", "::add", "::mul", "::div"),
}


class MixedAdamW:
    """AdamW and clipping on fp32 copies of the weights, as DeepSpeed's bf16 engine has them."""

    def __init__(self, weights: Iterable[nn.Parameter]):
        self.weights = list(weights)
        self.copies = [weight.detach().float().clone() for weight in self.weights]
        for copy in self.copies:
            copy.grad = torch.zeros_like(copy)
        self.adamw = torch.optim.AdamW(self.copies, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step(self) -> None:
        torch._foreach_copy_([copy.grad for copy in self.copies], [weight.grad for weight in self.weights])
        nn.utils.clip_grad_norm_(self.copies, CLIPPING)
        self.adamw.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.copies)
        for weight in self.weights:
            weight.grad = None


def train_step(model: MUG, optimizer: MixedAdamW, batch: Batch) -> dict[str, Tensor]:
    losses, _ = model(batch)
    sum(WEIGHTS[term] * loss for term, loss in losses.items()).backward()
    optimizer.step()
    return {term: loss.detach() for term, loss in losses.items()}


@dataclass(frozen=True)
class Blocks:
    """How the model's blocks run: each under torch.compile, and what their backward computes again."""

    compiled: bool
    activation_checkpointing: str


def measure_preset(
    preset: str, batch: int, steps: int, device: torch.device, blocks: Blocks, ceilings: Ceilings
) -> dict[str, Any]:
    """Returns metrics of a preset: speed, share of the matrix-product ceiling, memory, and shares of a step's time."""
    config = resolve(MUGConfig(preset))
    torch.manual_seed(0)
    if device.type == "cuda":  # or the peak would be that of a preset before this one, or of the ceilings
        torch.cuda.reset_peak_memory_stats(device)
    with device:  # a billion weights are drawn in no time on a GPU
        model = MUG(config, Context(vocabulary=VOCABULARY))
    model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    activation_checkpointing(model, blocks.activation_checkpointing)
    if blocks.compiled:
        compile_blocks(model)
    optimizer = MixedAdamW(model.parameters())
    samples = {name: x.to(device) for name, x in model.prepare(synthetic_batch(config, VOCABULARY, batch)).items()}
    for _ in range(WARM_UPS):
        train_step(model, optimizer, samples)
    seconds, losses = _timed(model, optimizer, samples, steps)
    flops = model.flops(samples) / batch
    return {
        "kind": "throughput",
        "preset": preset,
        "batch": batch,
        **asdict(blocks),
        "step_ms": 1e3 * seconds,
        "images_per_s": batch / seconds,
        "gflops_per_image": flops / 1e9,
        "mfu": flops * batch / seconds / ceilings.matmul,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        "losses": losses,
        "profile": profile(model, optimizer, samples, seconds),
    }


def _timed(model: MUG, optimizer: MixedAdamW, samples: Batch, steps: int) -> tuple[float, dict[str, float]]:
    """Returns (seconds of a step, losses of the last one)."""
    _wait(samples)
    begin = time.perf_counter()
    for _ in range(steps):
        losses = train_step(model, optimizer, samples)
    _wait(samples)
    return (time.perf_counter() - begin) / steps, {term: loss.item() for term, loss in losses.items()}


def _wait(samples: Batch) -> None:
    if samples["image"].is_cuda:
        torch.cuda.synchronize()


def profile(model: MUG, optimizer: MixedAdamW, samples: Batch, seconds: float) -> dict[str, float]:
    """Returns the share of a step's `seconds` of each group of kernels; "idle": of none (the host is behind)."""
    activity = torch.profiler.ProfilerActivity
    on_gpu = samples["image"].is_cuda
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profiler:
        for _ in range(PROFILED_STEPS):
            train_step(model, optimizer, samples)
        _wait(samples)
    shares = dict.fromkeys([*GROUPS, "other"], 0.0)
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        shares[group_of(event.key)] += microseconds / 1e6 / PROFILED_STEPS / seconds
    return {**shares, "idle": max(0.0, 1 - sum(shares.values()))}


def group_of(kernel: str) -> str:
    if kernel in OURS:
        return OURS[kernel]
    for group, parts in GROUPS.items():
        if any(part in kernel for part in parts):
            return group
    return "other"


def describe(row: dict[str, Any]) -> str:
    """Returns the row in one line, groups of less than 1% left out."""
    parts = sorted(row["profile"].items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {100 * share:.0f}%" for name, share in parts if share >= 0.01)
    memory = "" if row["peak_gb"] is None else f", {row['peak_gb']:.1f} GB"
    how = " compiled" * row["compiled"] + f", {row['activation_checkpointing']} recomputed" * (
        row["activation_checkpointing"] != "none"
    )
    return (
        f"{row['preset']}{how}, batch {row['batch']}: {row['step_ms']:.1f} ms,"
        f" {row['images_per_s']:.0f} images/s, MFU {100 * row['mfu']:.1f}%{memory}; {shares}"
    )
