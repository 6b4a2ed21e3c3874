"""Vocabulary projection and cross-entropy in one step: the caption head.

Dimension letters: N rows (tokens), K kept rows, R rows of a chunk, D width, V vocabulary.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mug.kernels.errors import BackendError

BACKENDS = ("auto", "triton", "chunked", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # imported at the first use of the kernel
MEMORY_BUDGET = 512 * 2**20
CHUNK_MULTIPLE = 256  # rows: full tiles of every matrix product
REFERENCE_BYTES = 12  # of one logit in plain PyTorch: logit, log-probability and gradient in fp32
ALIGNMENT = 64  # logits to which rows are padded: cuBLAS falls to slow kernels where they begin off 16 bytes
FP16_SCALE = 2.0**10  # of gradients of logits: a probability of 1 in 30,522 lies below fp16's normal numbers

logger = logging.getLogger("mug")


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    kept_K: Tensor | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns the mean cross-entropy of `hidden @ weightᵀ` over the rows whose target is not `ignore_index`.

    Rows to ignore are dropped before the product, so padding costs nothing. "triton" and "chunked" compute logits and
    both gradients some rows at a time, so [N, V] never exists; their backward only multiplies these by grad_output, in
    place, so the graph can be walked once.

    Args:
        hidden_ND: floating [N, D]; weight_VD: same dtype [V, D]; target_N: int64 [N].
        kept_K: int64 [K], the rows whose target is not `ignore_index`, each once, where the caller knows them. Without
            it they are searched, and the host waits for their number.
        label_smoothing: share of the target spread over all of V, as in F.cross_entropy.
        z_loss: weight of the mean squared log-sum-exp of the logits (PaLM, arXiv 2204.02311, section 5), which is
            added to the loss.
        memory_budget: bytes that logits may take at a time, at least one row. Both gradients are kept in fp32
            alongside them. None: 512 MiB; for "triton" and "chunked" on a GPU 2 GiB where 16 GiB were free at the
            first call, else 1 GiB.
        backend: "triton" (chunks, with one kernel from logits to their gradient), "chunked" (chunks in PyTorch),
            "reference" (plain PyTorch), or "auto": the reference where it fits the budget, as it does in small
            models, else triton on CUDA and chunked on a CPU; under torch.compile never the reference, as the others
            are one opaque operator.

    Returns:
        (loss, accuracy), fp32 scalars: the mean over the kept rows, and the share of them where no logit
        is larger than the target's (detached). Without a kept row both are 0, and the gradients are zero.

    Raises:
        ValueError: shapes or dtypes that disagree, an unknown backend, one asked for by name that cannot serve, or,
            on CPU, a target out of range or `kept_K` that disagrees with `ignore_index`; it names the argument. On CUDA
            a target out of range makes the loss NaN, and so does a kept row whose target is `ignore_index`, where that
            is out of range.
    """
    _check(hidden_ND, weight_VD, target_N, kept_K, ignore_index, backend)
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    small = not torch.compiler.is_compiling() and _fits(target_N, kept_K, len(weight_VD), memory_budget)
    backend = _choose_backend(backend, hidden_ND, weight_VD, small)
    if backend == "reference":
        return _reference(hidden_ND, weight_VD, target_N, kept_K, ignore_index, label_smoothing, z_loss)
    needs = [x.requires_grad and torch.is_grad_enabled() for x in (hidden_ND, weight_VD)]
    options = (ignore_index, label_smoothing, z_loss, memory_budget, backend == "triton")
    return _chunked(hidden_ND, weight_VD, target_N, kept_K, *options, *needs)[:2]


def _fits(target_N: Tensor, kept_K: Tensor | None, V: int, memory_budget: int | None) -> bool:
    rows = len(target_N if kept_K is None else kept_K)
    return rows * V * REFERENCE_BYTES <= (MEMORY_BUDGET if memory_budget is None else memory_budget)


@functools.cache  # querying free memory is a call to the driver
def default_budget(device: torch.device) -> int:
    """Returns the default bytes of logits at a time; only two values, so that runs chunk alike."""
    if device.type != "cuda":
        return MEMORY_BUDGET
    free, _ = torch.cuda.mem_get_info(device)
    return 2**31 if free >= 2**34 else 2**30


def _check(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, kept_K: Tensor | None, ignore_index: int, backend: str
) -> None:
    if backend not in BACKENDS:
        raise BackendError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if hidden_ND.shape[0] != target_N.shape[0]:
        raise ValueError(f"hidden has {hidden_ND.shape[0]} rows, target {target_N.shape[0]}")
    if hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden has width {hidden_ND.shape[1]}, weight {weight_VD.shape[1]}")
    if target_N.dtype != torch.int64:
        raise ValueError(f"target is {target_N.dtype}, not torch.int64")
    if kept_K is not None and (kept_K.dtype != torch.int64 or kept_K.dim() != 1):
        raise ValueError(f"kept is {kept_K.dtype} {list(kept_K.shape)}, not torch.int64 of one dimension")
    if kept_K is not None and kept_K.device != target_N.device:
        raise ValueError(f"kept is on {kept_K.device}, target on {target_N.device}")
    if target_N.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(target_N, kept_K, ignore_index, len(weight_VD))


def _check_values(target_N: Tensor, kept_K: Tensor | None, ignore_index: int, V: int) -> None:
    counts_N = target_N != ignore_index
    wrong = target_N[counts_N & ((target_N < 0) | (target_N >= V))]
    if len(wrong):
        raise ValueError(f"target holds {int(wrong[0])}, the vocabulary has {V}")
    if kept_K is not None and not torch.equal(kept_K.sort().values, counts_N.nonzero().squeeze(1)):
        raise ValueError(f"kept must name the {int(counts_N.sum())} rows whose target is not {ignore_index}, each once")


def _kept_rows(target_N: Tensor, ignore_index: int) -> Tensor:
    return (target_N != ignore_index).nonzero().squeeze(1)


def _choose_backend(backend: str, hidden_ND: Tensor, weight_VD: Tensor, small: bool) -> str:
    """`small`: the reference may serve, as all of its logits fit the budget."""
    if backend == "auto":
        backend = "triton" if hidden_ND.is_cuda and HAS_TRITON else "chunked"
        backend = "reference" if small or _obstacle(backend, hidden_ND, weight_VD) else backend
        if not torch.compiler.is_compiling():
            _log_choice(hidden_ND.device.type, backend)
    elif obstacle := _obstacle(backend, hidden_ND, weight_VD):
        raise BackendError(f'backend="{backend}" cannot serve this call: {obstacle}')
    return backend


def _obstacle(backend: str, hidden_ND: Tensor, weight_VD: Tensor) -> str | None:
    """Returns why the backend cannot serve, naming the argument; None if it can."""
    device = hidden_ND.device.type
    if backend == "reference":
        return None
    if hidden_ND.dtype not in DTYPES or weight_VD.dtype != hidden_ND.dtype:
        return f"hidden is {hidden_ND.dtype}, weight {weight_VD.dtype}; it takes one of fp32, fp16, bf16"
    if backend == "chunked":
        return None
    if not HAS_TRITON:
        return "triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"hidden is on {device}, which needs TRITON_INTERPRET=1"
    return None


@functools.cache
def _log_choice(device: str, backend: str) -> None:
    logger.info("linear_cross_entropy on %s: %s", device, backend)


def _reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    kept_K: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    kept_K = _kept_rows(target_N, ignore_index) if kept_K is None else kept_K
    count = max(len(kept_K), 1)
    logits_KV = F.linear(hidden_ND[kept_K], weight_VD).float()
    target_K = target_N[kept_K]
    loss = F.cross_entropy(logits_KV, target_K, reduction="sum", label_smoothing=label_smoothing) / count
    if z_loss:
        loss = loss + z_loss * logits_KV.logsumexp(-1).square().sum() / count
    picked_K = logits_KV.detach().gather(1, target_K[:, None]).squeeze(1)
    accuracy = (picked_K >= logits_KV.detach().amax(-1)).sum() / count
    return loss, accuracy


@torch.library.custom_op("mug::linear_cross_entropy", mutates_args=())
def _chunked(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    kept_K: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    memory_budget: int | None,
    triton: bool,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (loss, accuracy, divisor of the gradients, gradients by hidden and weight times it or empty), fp32."""
    kept_K = _kept_rows(target_N, ignore_index) if kept_K is None else kept_K
    memory_budget = default_budget(hidden_ND.device) if memory_budget is None else memory_budget
    grad_ND = hidden_ND.new_zeros(hidden_ND.shape if needs_hidden else 0, dtype=torch.float32)
    grad_VD = weight_VD.new_empty(weight_VD.shape if needs_weight else 0, dtype=torch.float32)
    loss, hits = hidden_ND.new_zeros(2, dtype=torch.float32).unbind()
    scale = FP16_SCALE if hidden_ND.dtype == torch.float16 else 1.0
    options = (label_smoothing, z_loss, scale, needs_hidden or needs_weight)
    chunks = kept_K.split(_chunk_rows(hidden_ND, len(weight_VD), len(kept_K), memory_budget, triton))
    buffer = hidden_ND.new_empty(len(chunks[0]), _padded(len(weight_VD)))
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        for turn, kept_R in enumerate(chunks):
            hidden_RD, x_RV = hidden_ND[kept_R], buffer[: len(kept_R), : len(weight_VD)]
            torch.mm(hidden_RD, weight_VD.T, out=x_RV)
            loss_R, hit_R = _loss_to_gradient_(triton)(x_RV, target_N[kept_R], *options)
            loss += loss_R.sum()
            hits += hit_R.sum()
            if needs_hidden:
                grad_ND[kept_R] = _product(x_RV, weight_VD)
            if needs_weight:
                _product(x_RV.T, hidden_RD, grad_VD, add=turn > 0)
    count = max(len(kept_K), 1)
    return loss / count, hits / count, torch.full_like(loss, count * scale), grad_ND, grad_VD


def _padded(V: int) -> int:
    return -(-V // ALIGNMENT) * ALIGNMENT


def _chunk_rows(hidden_ND: Tensor, V: int, kept: int, memory_budget: int, triton: bool) -> int:
    """Returns the rows of each chunk but the last: equal chunks that fit the budget, of at least one row."""
    # In half precision PyTorch's operators need logits in fp32 as well, and write each new value elsewhere.
    logit_bytes = 8 if hidden_ND.dtype != torch.float32 and not triton else hidden_ND.element_size()
    fitting = max(memory_budget // (_padded(V) * logit_bytes), 1)
    multiple = CHUNK_MULTIPLE if fitting >= CHUNK_MULTIPLE else 1
    chunks = max(-(-kept // (fitting // multiple * multiple)), 1)
    return max(-(-kept // (chunks * multiple)) * multiple, 1)


def _loss_to_gradient_(triton: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    if not triton:
        return _loss_to_gradient_in_torch_
    from mug.kernels import linear_cross_entropy_triton as kernels

    return kernels.loss_to_gradient_


def _loss_to_gradient_in_torch_(
    logits_RV: Tensor, target_R: Tensor, label_smoothing: float, z_loss: float, scale: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Returns, as the Triton kernel, (loss, hit) of each row; the logits become scale times their gradient."""
    x_RV, target_R1 = logits_RV.float(), target_R[:, None]
    top_R1, picked_R1 = x_RV.amax(-1, keepdim=True), x_RV.gather(1, target_R1)
    mean_R1 = x_RV.mean(-1, keepdim=True) if label_smoothing else 0.0
    sum_R1 = x_RV.sub_(top_R1).exp_().sum(-1, keepdim=True)
    lse_R1 = top_R1 + sum_R1.log()
    loss_R1 = lse_R1 - (1 - label_smoothing) * picked_R1 - label_smoothing * mean_R1 + z_loss * lse_R1.square()
    if gradient:
        x_RV.mul_(scale * (1 + 2 * z_loss * lse_R1) / sum_R1)
        if label_smoothing:
            x_RV.sub_(scale * label_smoothing / x_RV.shape[1])
        x_RV.scatter_add_(1, target_R1, torch.full_like(picked_R1, scale * (label_smoothing - 1)))
        logits_RV.copy_(x_RV)
    return loss_R1.squeeze(1), (picked_R1 >= top_R1).squeeze(1)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Returns a @ b in fp32, written to `out` or added to it; on CUDA the factors stay in half precision."""
    options: dict[str, Any] = {"out_dtype": torch.float32}
    if not a.is_cuda or a.dtype == torch.float32:
        a, b, options = a.float(), b.float(), {}
    out = a.new_empty(len(a), b.shape[1], dtype=torch.float32) if out is None else out
    return torch.addmm(out, a, b, **options, out=out) if add else torch.mm(a, b, **options, out=out)


@_chunked.register_fake
def _(
    hidden_ND, weight_VD, target_N, kept, ignore_index, smoothing, z_loss, budget, triton, needs_hidden, needs_weight
):
    loss, accuracy, divisor = (hidden_ND.new_empty((), dtype=torch.float32) for _ in range(3))
    grad_ND = hidden_ND.new_empty(hidden_ND.shape if needs_hidden else 0, dtype=loss.dtype)
    grad_VD = weight_VD.new_empty(weight_VD.shape if needs_weight else 0, dtype=loss.dtype)
    return loss, accuracy, divisor, grad_ND, grad_VD


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    _, accuracy, *saved = output
    ctx.mark_non_differentiable(accuracy)
    ctx.dtype = inputs[0].dtype  # weight's as well
    ctx.save_for_backward(*saved)


def _backward(ctx, grad_output: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    divisor, grad_ND, grad_VD = ctx.saved_tensors
    needs_hidden, needs_weight, *_ = ctx.needs_input_grad
    if grad_output is None:
        return (None,) * 11
    scale = grad_output / divisor
    # In place: a second copy of the weight's gradient would stand at the peak of a step's memory.
    grad_hidden = grad_ND.mul_(scale).to(ctx.dtype) if needs_hidden else None
    return grad_hidden, grad_VD.mul_(scale).to(ctx.dtype) if needs_weight else None, *(None,) * 9


_chunked.register_autograd(_backward, setup_context=_save_for_backward)
