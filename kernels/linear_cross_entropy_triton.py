"""Triton kernel of linear_cross_entropy; imported at first use, as Triton may be absent.

Roofline of bf16 logits on an H100: the three products around this kernel do 6·D = 4.6 kFLOP a logit at D = 768, 6.6 ps
at 700 TFLOP/s; to read a logit once and write its gradient over it moves 4 bytes, 1.3 ps at 3 TB/s. PyTorch's own
passes (copy to fp32, maximum, exp, sum, product, ...) move 48, 16 ps: more than twice the products' time.

Dimension letters: R rows, V vocabulary, K logits of one turn of the loop.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 4096, 8  # 16 logits a lane: two 16-byte loads of bf16


@triton.jit
def _loss_kernel(
    logits, target, loss, hit, stride, V, smoothing, z_loss, scale, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(target + row)
    known = (label >= 0) & (label < V)
    picked = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
    k = tl.arange(0, BLOCK)
    top, total, sum_exp = float("-inf"), 0.0, 0.0
    for start in range(0, V, BLOCK):
        x_K = _load(logits, start + k, stride, V)
        new_top = tl.maximum(top, tl.max(x_K, 0))
        sum_exp = sum_exp * tl.exp(top - new_top) + tl.sum(tl.exp(x_K - new_top), 0)
        total += tl.sum(tl.where(start + k < V, x_K, 0.0), 0)
        top = new_top
    lse = top + tl.log(sum_exp)
    tl.store(loss + row, lse - (1 - smoothing) * picked - smoothing * total / V + z_loss * lse * lse)
    tl.store(hit + row, (picked >= top).to(tl.float32))
    if GRADIENT:
        factor = scale * (1 + 2 * z_loss * lse)
        for start in range(0, V, BLOCK):  # once more, now from L2: a row of 30,522 takes 61 kB
            x_K = _load(logits, start + k, stride, V)
            share_K = tl.where(start + k == label, 1 - smoothing, 0.0) + smoothing / V
            tl.store(logits + start + k, factor * tl.exp(x_K - lse) - scale * share_K, mask=start + k < stride)


@triton.jit
def _load(logits, place_K, stride, V):
    # The mask is of the padded row: it ends on a multiple of 16 bytes, so loads and stores stay wide.
    x_K = tl.load(logits + place_K, mask=place_K < stride, other=float("-inf")).to(tl.float32)
    return tl.where(place_K < V, x_K, float("-inf"))


def loss_to_gradient_(
    logits_RV: Tensor, target_R: Tensor, label_smoothing: float, z_loss: float, scale: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Returns (loss, whether no logit exceeds the target's) of each row, fp32 [R]; NaN where it is out of range.

    Where `gradient` is true, overwrites `logits_RV` with scale times the gradient of the loss by them. A row is
    contiguous, the next one begins `stride(0)` later, and what lies between is padding that the kernel may overwrite.
    """
    R, V = logits_RV.shape
    loss_R, hit_R = torch.empty(2, R, dtype=torch.float32, device=logits_RV.device).unbind()
    numbers = (logits_RV.stride(0), V, label_smoothing, z_loss, scale)
    constants = {"GRADIENT": gradient, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
    with torch.cuda.device_of(logits_RV):  # Triton launches on the current device
        _loss_kernel[(R,)](logits_RV, target_R, loss_R, hit_R, *numbers, **constants)
    return loss_R, hit_R
