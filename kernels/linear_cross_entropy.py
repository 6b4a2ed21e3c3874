"""Vocabulary projection and cross-entropy in one step: the caption head.

Dimension letters: N rows (tokens), K kept rows, R rows of a chunk, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "chunked", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MEMORY_BUDGET = 512 * 2**20
REFERENCE_BYTES = 12  # of one logit in plain PyTorch: logit, log-probability and gradient in fp32


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    memory_budget: int = MEMORY_BUDGET,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of `hidden @ weightᵀ` over the rows whose target is not `ignore_index`.

    Rows to ignore are dropped before the product, so padding costs nothing. The chunked backend computes logits and
    both gradients some rows at a time, so [N, V] never exists; its backward only multiplies by grad_output.

    Args:
        hidden_ND: floating [N, D]; weight_VD: same dtype [V, D]; target_N: int64 [N].
        label_smoothing: share of the target spread over all of V, as in F.cross_entropy.
        z_loss: weight of the mean squared log-sum-exp of the logits (PaLM, arXiv 2204.02311, section 5), which is
            added to the loss.
        memory_budget: bytes that logits may take at a time; the chunked backend keeps one row at least. Beside
            them it keeps both gradients in fp32.
        backend: "chunked", "reference" (plain PyTorch), or "auto": the reference where it fits the budget, as it
            does in small models, else chunked; under torch.compile always chunked, which is one opaque operator.

    Returns:
        (loss, accuracy), fp32 scalars: the mean over the kept rows, and the share of them whose largest
        logit is the target (detached). Without a kept row both are 0, and the gradients are zero.

    Raises:
        ValueError: shapes or dtypes that disagree, an unknown backend, "chunked" for another dtype than fp32, fp16
            or bf16, or, on CPU, a target out of range; it names the argument.
    """
    _check(hidden_ND, weight_VD, target_N, ignore_index, backend)
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    if backend == "auto":
        fits = len(target_N) * len(weight_VD) * REFERENCE_BYTES <= memory_budget
        small = fits and not torch.compiler.is_compiling()
        backend = "reference" if small or hidden_ND.dtype not in DTYPES else "chunked"
    if backend == "reference":
        return _reference(hidden_ND, weight_VD, target_N, ignore_index, label_smoothing, z_loss)
    if hidden_ND.dtype not in DTYPES or weight_VD.dtype != hidden_ND.dtype:
        raise ValueError(f'backend="chunked" cannot serve hidden {hidden_ND.dtype} with weight {weight_VD.dtype}')
    needs = [x.requires_grad and torch.is_grad_enabled() for x in (hidden_ND, weight_VD)]
    options = (ignore_index, label_smoothing, z_loss, memory_budget)
    return _chunked(hidden_ND, weight_VD, target_N, *options, *needs)[:2]


def _check(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, ignore_index: int, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if hidden_ND.shape[0] != target_N.shape[0]:
        raise ValueError(f"hidden has {hidden_ND.shape[0]} rows, target {target_N.shape[0]}")
    if hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden has width {hidden_ND.shape[1]}, weight {weight_VD.shape[1]}")
    if target_N.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = target_N[(target_N != ignore_index) & ((target_N < 0) | (target_N >= len(weight_VD)))]
        if len(wrong):
            raise ValueError(f"target holds {int(wrong[0])}, the vocabulary has {len(weight_VD)}")


def _reference(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    kept = (target_N != ignore_index).nonzero().squeeze(1)
    count = max(kept.numel(), 1)
    logits_KV = F.linear(hidden_ND[kept], weight_VD).float()
    target_K = target_N[kept]
    loss = F.cross_entropy(logits_KV, target_K, reduction="sum", label_smoothing=label_smoothing) / count
    if z_loss:
        loss = loss + z_loss * logits_KV.logsumexp(-1).square().sum() / count
    accuracy = (logits_KV.detach().argmax(-1) == target_K).sum() / count
    return loss, accuracy


@torch.library.custom_op("mug::linear_cross_entropy", mutates_args=())
def _chunked(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    memory_budget: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, accuracy, kept rows, gradients of the summed loss by hidden and by weight, or empty), all fp32."""
    kept = (target_N != ignore_index).nonzero().squeeze(1)
    grad_ND = hidden_ND.new_zeros(hidden_ND.shape if needs_hidden else 0, dtype=torch.float32)
    grad_VD = weight_VD.new_zeros(weight_VD.shape if needs_weight else 0, dtype=torch.float32)
    loss, hits = hidden_ND.new_zeros((), dtype=torch.float32), target_N.new_zeros(())
    # Half precision holds a logit three times: as multiplied, in fp32, and its gradient as multiplied.
    logit_bytes = 4 if hidden_ND.dtype == torch.float32 else 8
    rows = max(1, memory_budget // (len(weight_VD) * logit_bytes))
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        for kept_R in kept.split(rows):
            hidden_RD, target_R = hidden_ND[kept_R], target_N[kept_R]
            x_RV = F.linear(hidden_RD, weight_VD).float()
            hits += (x_RV.argmax(-1) == target_R).sum()
            loss += _loss_to_gradient_(x_RV, target_R, label_smoothing, z_loss)
            grad_RV = x_RV.to(weight_VD.dtype) if x_RV.is_cuda else x_RV
            if needs_hidden:
                grad_ND[kept_R] = _add_product_(torch.zeros_like(hidden_RD, dtype=torch.float32), grad_RV, weight_VD)
            if needs_weight:
                _add_product_(grad_VD, grad_RV.T, hidden_RD)
    count = torch.full_like(loss, max(kept.numel(), 1))
    return loss / count, hits / count, count, grad_ND, grad_VD


def _loss_to_gradient_(x_RV: Tensor, target_R: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """Summed loss of the rows; overwrites their fp32 logits `x_RV` with its gradient, of order 1 a row."""
    target_R1 = target_R[:, None]
    top_R1 = x_RV.amax(-1, keepdim=True)
    picked_R1 = x_RV.gather(1, target_R1)
    mean_R1 = x_RV.mean(-1, keepdim=True) if label_smoothing else 0.0
    sum_R1 = x_RV.sub_(top_R1).exp_().sum(-1, keepdim=True)
    lse_R1 = top_R1 + sum_R1.log()
    loss_R1 = lse_R1 - (1 - label_smoothing) * picked_R1 - label_smoothing * mean_R1 + z_loss * lse_R1.square()
    x_RV.mul_((1 + 2 * z_loss * lse_R1) / sum_R1)
    if label_smoothing:
        x_RV.sub_(label_smoothing / x_RV.shape[1])
    x_RV.scatter_add_(1, target_R1, torch.full_like(picked_R1, label_smoothing - 1))
    return loss_R1.sum()


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b in fp32; the factors stay in half precision where `a` is, so on CUDA."""
    if a.dtype == torch.float32:
        return total.addmm_(a, b.float())
    return total.add_(torch.mm(a, b, out_dtype=torch.float32))


@_chunked.register_fake
def _(hidden_ND, weight_VD, target_N, ignore_index, label_smoothing, z_loss, budget, needs_hidden, needs_weight):
    loss, accuracy, count = (hidden_ND.new_empty((), dtype=torch.float32) for _ in range(3))
    grad_ND = hidden_ND.new_empty(hidden_ND.shape if needs_hidden else 0, dtype=loss.dtype)
    return loss, accuracy, count, grad_ND, weight_VD.new_empty(weight_VD.shape if needs_weight else 0, dtype=loss.dtype)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    _, accuracy, *saved = output
    ctx.mark_non_differentiable(accuracy)
    ctx.dtype = inputs[0].dtype  # weight's as well
    ctx.save_for_backward(*saved)


def _backward(ctx, grad_output: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    count, grad_ND, grad_VD = ctx.saved_tensors
    needs_hidden, needs_weight, *_ = ctx.needs_input_grad
    if grad_output is None:
        return (None,) * 9
    scale = grad_output / count
    grad_hidden = (grad_ND * scale).to(ctx.dtype) if needs_hidden else None
    return grad_hidden, (grad_VD * scale).to(ctx.dtype) if needs_weight else None, *(None,) * 7


_chunked.register_autograd(_backward, setup_context=_save_for_backward)
