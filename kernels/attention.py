"""Scaled dot-product attention over the short sequences of MUG.

Dimension letters: B batch or packed sequences, N tokens (Nq queries, Nk keys), T tokens of all sequences, H heads,
D head dimension. A name without letters may be dense, [B, N, H, D], or packed, [T, H, D].
"""

import functools
import logging
import os

import torch
from torch import Tensor

from mug.kernels.attention_backends import HALVES, RUN, Masks, obstacle, sdpa
from mug.kernels.attention_table import TABLE, Key, architecture, bucket

BACKENDS = ("auto", *RUN)
DEFAULT_BACKEND = os.environ.get("MUG_ATTENTION_BACKEND", "auto")  # of calls that leave it to "auto"
UNMEASURED = "sdpa"

logger = logging.getLogger("mug")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q kᵀ · scale) v for each head.

    Args:
        q: [B, Nq, H, D]; k, v: [B, Nk, H, D]; one floating dtype. With cu_seqlens q is [Tq, H, D], k and v [Tk, H, D].
        causal: query i sees keys 0..i; needs as many queries as keys, in each sequence.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], where each packed sequence begins, and at last T; both or neither.
        max_seqlen: no packed sequence is longer. None: read from cu_seqlens, for which the host waits (and which
            torch.compile cannot trace). Too small a number leaves output unwritten on a GPU.
        kv_lengths: int [B], keys of a sequence from this index on are padding. A row of padding alone gives 0.
        scale: 1/sqrt(D) if None.
        backend: "triton" (the project's kernels), "sdpa" (PyTorch chooses among its own), "sdpa_cudnn", "sdpa_flash",
            "sdpa_efficient", "sdpa_math", "flash_attn" (FlashAttention 3 or 2), "flash_attn_4", "reference" (plain
            matmul and softmax) or "auto": $MUG_ATTENTION_BACKEND if set, else on a GPU in half precision what
            attention_table.json names as fastest, else "sdpa". Its choice is logged once for each kind of call.

    Returns:
        Like q.

    Raises:
        ValueError: shapes that disagree, an unknown backend, or one asked for by name that cannot serve; it names the
            argument.
    """
    backend = DEFAULT_BACKEND if backend == "auto" else backend
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if cu_seqlens_q is None and cu_seqlens_k is None:
        sequences, longest_q, longest_k = _check_dense(q, k, v, causal)
    else:
        sequences = _check_packed(q, k, v, causal, cu_seqlens_q, cu_seqlens_k)
        longest_q = longest_k = _longest(cu_seqlens_q, cu_seqlens_k, max_seqlen)
    if kv_lengths is not None and kv_lengths.shape != (sequences,):
        raise ValueError(f"kv_lengths has shape {tuple(kv_lengths.shape)}, expected ({sequences},)")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    masks = Masks(causal, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, kv_lengths, scale)
    if backend == "auto" and q.is_cpu:  # one choice, and the calls are so short there that looking it up would show
        _log_cpu()
        return sdpa(q, k, v, masks)
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    return RUN[_choose(backend, q, k, v, masks)](q, k, v, masks)


def _check_dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[int, int, int]:
    """B, Nq, Nk."""
    if not q.ndim == k.ndim == 4:
        raise ValueError(f"q and k must be [B, N, H, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    (B, Nq, H, D), (k_B, Nk, k_H, k_D) = q.shape, k.shape
    if k.shape != v.shape or k_B != B or k_H != H or k_D != D:
        raise ValueError(f"q, k and v must agree in B, H, D, and k with v in N: {_shapes(q, k, v)}")
    if causal and Nq != Nk:
        raise ValueError(f"causal needs as many queries as keys, got {Nq} and {Nk}")
    return B, Nq, Nk


def _check_packed(q: Tensor, k: Tensor, v: Tensor, causal: bool, cu_q: Tensor | None, cu_k: Tensor | None) -> int:
    """B, the number of sequences."""
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seqlens_q and cu_seqlens_k come together or not at all")
    if not q.ndim == k.ndim == 3:
        shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"q and k must be [T, H, D], as cu_seqlens are given, got {shapes}")
    if k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(f"q, k and v must agree in H, D, and k with v in T: {_shapes(q, k, v)}")
    if cu_q.ndim != 1 or cu_q.shape != cu_k.shape or len(cu_q) < 2:
        shapes = f"{tuple(cu_q.shape)}, {tuple(cu_k.shape)}"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must both be [B + 1], got {shapes}")
    if cu_q.dtype != torch.int32 or cu_k.dtype != torch.int32:
        raise ValueError(f"cu_seqlens_q is {cu_q.dtype}, cu_seqlens_k {cu_k.dtype}: both must be torch.int32")
    if cu_q.is_cpu and not torch.compiler.is_compiling():
        _check_starts(len(q), len(k), causal, cu_q, cu_k)
    return len(cu_q) - 1


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _check_starts(q_tokens: int, k_tokens: int, causal: bool, cu_q: Tensor, cu_k: Tensor) -> None:
    for name, cu, tokens in (("cu_seqlens_q", cu_q, q_tokens), ("cu_seqlens_k", cu_k, k_tokens)):
        starts = cu.tolist()
        if starts[0] != 0 or starts[-1] != tokens or starts != sorted(starts):
            raise ValueError(f"{name} must rise from 0 to {tokens}, got {starts}")
    if causal and not torch.equal(cu_q, cu_k):
        raise ValueError("causal needs as many queries as keys: cu_seqlens_q and cu_seqlens_k differ")


def _longest(cu_q: Tensor, cu_k: Tensor, max_seqlen: int | None) -> int:
    """A bound on the tokens of any packed sequence."""
    if max_seqlen is not None:
        return max_seqlen
    return max(int(cu.diff().max()) for cu in (cu_q, cu_k))


def _choose(backend: str, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> str:
    if backend != "auto":
        hindrance = obstacle(backend, q, k, v, masks)
        if hindrance:
            raise ValueError(f'backend="{backend}" cannot serve this call: {hindrance}')
        return backend
    training, packed = q.requires_grad and torch.is_grad_enabled(), masks.cu_seqlens_q is not None
    half, tokens = q.dtype in HALVES, bucket(max(masks.longest_q, masks.longest_k))
    backend = _measured(str(q.device), half, training, q.shape[-1], tokens, masks.causal, packed)
    return UNMEASURED if backend is None or obstacle(backend, q, k, v, masks) else backend


@torch.compiler.assume_constant_result
@functools.cache
def _measured(device: str, half: bool, training: bool, D: int, tokens: int, causal: bool, packed: bool) -> str | None:
    """The table's backend for this kind of call; logged, once as the result is kept."""
    backend = None
    if half and device.startswith("cuda"):
        backend = TABLE.get(Key(architecture(device), training, D, tokens, causal, packed))
    choice = f"{backend}, as measured" if backend else f"{UNMEASURED}, for want of a measurement"
    kind = f"{'training' if training else 'inference'}, D={D}, N up to {tokens}, causal={causal}, varlen={packed}"
    logger.info("attention on %s (%s): %s", device, kind, choice)
    return backend


@torch.compiler.assume_constant_result
@functools.cache
def _log_cpu() -> None:
    logger.info("attention on cpu: sdpa")
