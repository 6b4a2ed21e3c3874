"""Scaled dot-product attention over the short sequences of MUG.

Dimension letters: B batch or packed sequences, N tokens (Nq queries, Nk keys), T tokens of all sequences, H heads,
D head dimension. A name without letters may be dense, [B, N, H, D], or packed, [T, H, D].
"""

import functools
import logging
import os

import torch
from torch import Tensor

from mug.kernels.attention_backends import HALVES, RUN, Masks, apart, constant_when_compiled, obstacle, sdpa
from mug.kernels.attention_table import TABLE, Key, architecture, bucket
from mug.kernels.errors import BackendError

BACKENDS = ("auto", *RUN)
DEFAULT_BACKEND = os.environ.get("MUG_ATTENTION_BACKEND", "auto")  # of calls that leave it to "auto"
# Without a measurement, the first that can serve. "sdpa" takes packed sequences apart, pads them and masks the
# padding, which costs more than any kernel saves; the project's kernels take fp32 as well.
UNMEASURED = {"packed": ("sdpa_flash", "triton", "sdpa"), "dense": ("sdpa",)}

logger = logging.getLogger("mug")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Returns softmax(q kᵀ · scale) v for each head.

    Args:
        q: [B, Nq, H, D]; k, v: [B, Nk, H, D]; one floating dtype. With cu_seqlens q is [Tq, H, D], k and v [Tk, H, D].
        causal: query i sees keys 0..i; needs as many queries as keys, in each sequence.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], where each packed sequence begins, and at last T; both or neither.
        max_seqlen_q, max_seqlen_k: no packed sequence has more queries, or keys. None: read from cu_seqlens, for which
            the host waits (and which torch.compile cannot trace). Too small a number leaves output unwritten on a GPU.
        kv_lengths: int [B], keys of a sequence from this index on are padding. A row of padding alone gives 0.
        scale: 1/sqrt(D) if None.
        backend: "triton" (the project's kernels), "sdpa" (PyTorch chooses among its own), "sdpa_cudnn", "sdpa_flash",
            "sdpa_efficient", "sdpa_math", "flash_attn" (FlashAttention 3 or 2), "flash_attn_4", "reference" (plain
            matmul and softmax) or "auto": $MUG_ATTENTION_BACKEND if set, else on a GPU in half precision what
            attention_table.json names as fastest, else what UNMEASURED names. Its choice is logged once for each kind
            of call.

    Returns:
        Like q.

    Raises:
        ValueError: shapes that disagree, an unknown backend, or one requested by name that cannot serve; it names the
            argument.
    """
    starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return _attend((q, k, v), causal, starts, longest, kv_lengths, scale, backend)


def attention_qkv(
    qkv: Tensor,
    *,
    causal: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    kv_lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Returns self-attention of q, k and v as one projection makes them.

    The project's kernels write the gradient into one tensor like qkv; other backends make three, stacked afterwards.

    Args:
        qkv: [B, N, 3, H, D]; with cu_seqlens [T, 3, H, D].
        cu_seqlens: int32 [B + 1], where each packed sequence begins, and at last T.
        max_seqlen: no packed sequence has more tokens; None: read from cu_seqlens.
        The rest as of `attention`.

    Returns:
        [B, N, H, D] or [T, H, D].
    """
    _check_whole("qkv", qkv, 3)
    return _attend((qkv,), causal, (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen), kv_lengths, None, backend)


def attention_kv(
    q: Tensor,
    kv: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    kv_lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Returns cross-attention to k and v as one projection makes them; the gradient of kv as of qkv in `attention_qkv`.

    Args:
        q: [B, Nq, H, D]; kv: [B, Nk, 2, H, D]. With cu_seqlens [Tq, H, D] and [Tk, 2, H, D].
        The rest as of `attention`.

    Returns:
        Like q.
    """
    _check_whole("kv", kv, 2)
    starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return _attend((q, kv), False, starts, longest, kv_lengths, None, backend)


def _attend(
    parts: tuple[Tensor, ...],
    causal: bool,
    starts: tuple[Tensor | None, Tensor | None],
    longest: tuple[int | None, int | None],
    kv_lengths: Tensor | None,
    scale: float | None,
    backend: str,
) -> Tensor:
    """`parts`: (qkv,), (q, kv) or (q, k, v)."""
    q, k, v = apart(parts)
    backend = DEFAULT_BACKEND if backend == "auto" else backend
    if backend not in BACKENDS:
        raise BackendError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}; see MUG_ATTENTION_BACKEND")
    if starts[0] is None and starts[1] is None:
        sequences, longest_q, longest_k = _check_dense(q, k, v, causal)
    else:
        sequences = _check_packed(q, k, v, causal, *starts)
        longest_q, longest_k = (_longest(cu) if n is None else n for cu, n in zip(starts, longest, strict=True))
    if kv_lengths is not None and kv_lengths.shape != (sequences,):
        raise ValueError(f"kv_lengths has shape {tuple(kv_lengths.shape)}, expected ({sequences},)")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    masks = Masks(causal, *starts, longest_q, longest_k, kv_lengths, scale)
    if backend == "auto" and q.is_cpu:  # one choice, and a lookup would cost as much as such short calls
        if not torch.compiler.is_compiling():
            _log_cpu()
        return sdpa(q, k, v, masks)
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        parts = tuple(x.to(torch.get_autocast_dtype(device)) for x in parts)
    return RUN[_choose(backend, *apart(parts), masks)](parts, masks)


def _check_whole(name: str, x: Tensor, parts: int) -> None:
    if x.ndim < 4 or x.shape[-3] != parts:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [..., {parts}, H, D]")


def _check_dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[int, int, int]:
    """Returns B, Nq, Nk."""
    if not q.ndim == k.ndim == 4:
        raise ValueError(f"q and k must be [B, N, H, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    (B, Nq, H, D), (k_B, Nk, k_H, k_D) = q.shape, k.shape
    if k.shape != v.shape or k_B != B or k_H != H or k_D != D:
        raise ValueError(f"q, k and v must agree in B, H, D, and k with v in N: {_shapes(q, k, v)}")
    if causal and Nq != Nk:
        raise ValueError(f"causal needs as many queries as keys, got {Nq} and {Nk}")
    return B, Nq, Nk


def _check_packed(q: Tensor, k: Tensor, v: Tensor, causal: bool, cu_q: Tensor | None, cu_k: Tensor | None) -> int:
    """Returns B, the number of sequences."""
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


def _longest(cu_seqlens: Tensor | None) -> int:
    """Returns the tokens of the longest packed sequence."""
    assert cu_seqlens is not None
    return int(cu_seqlens.diff().max())


def _choose(backend: str, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> str:
    if backend != "auto":
        hindrance = obstacle(backend, q, k, v, masks)
        if hindrance:
            raise BackendError(f'attention backend="{backend}" cannot serve this call: {hindrance}')
        return backend
    training, packed = q.requires_grad and torch.is_grad_enabled(), masks.cu_seqlens_q is not None
    queries, keys = bucket(masks.longest_q), bucket(masks.longest_k)
    kind = (str(q.device), q.dtype in HALVES, training, q.shape[-1], queries, keys, masks.causal, packed)
    for choice in _candidates(*kind):
        if obstacle(choice, q, k, v, masks) is None:
            break  # at the latest at "sdpa", the last one, which serves everything
    _log_choice(choice, *kind)
    return choice


@constant_when_compiled  # on a function around the cached one, as torch.compile looks into caches
def _candidates(*kind) -> tuple[str, ...]:
    return _look_up(*kind)


@functools.cache
def _look_up(
    device: str, half: bool, training: bool, D: int, queries: int, keys: int, causal: bool, packed: bool
) -> tuple[str, ...]:
    """Returns the backends to try for this kind of call: that of the table, then those that need no measurement."""
    unmeasured = UNMEASURED["packed" if packed else "dense"]
    if not half or not device.startswith("cuda"):
        return unmeasured
    measured = TABLE.get(Key(architecture(device), training, D, queries, keys, causal, packed))
    return (measured, *unmeasured) if measured else unmeasured


@constant_when_compiled
def _log_choice(choice: str, *kind) -> None:
    _log_once(choice, *kind)


@functools.cache
def _log_once(choice: str, *kind) -> None:
    device, half, training, D, queries, keys, causal, packed = kind
    measured = choice == _look_up(*kind)[0] and _look_up(*kind) not in UNMEASURED.values()
    logger.info(
        "attention on %s (%s, %s precision, D=%d, N up to %d, keys up to %d, causal=%s, varlen=%s): %s, %s",
        device,
        "training" if training else "inference",
        "half" if half else "full",
        D,
        queries,
        keys,
        causal,
        packed,
        choice,
        "as measured" if measured else "not measured",
    )


@functools.cache
def _log_cpu() -> None:
    logger.info("attention on cpu: sdpa")
