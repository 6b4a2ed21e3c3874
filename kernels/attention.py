"""Scaled dot-product attention over the short sequences of MUG.

Dimension letters: B batch, N tokens (Nq queries, Nk keys), H heads, D head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "sdpa", "reference")


def attention(
    q_BNHD: Tensor,
    k_BNHD: Tensor,
    v_BNHD: Tensor,
    *,
    causal: bool = False,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q kᵀ · scale) v for each head.

    Args:
        q_BNHD: [B, Nq, H, D]; k_BNHD, v_BNHD: [B, Nk, H, D]; one floating dtype.
        causal: query i sees keys 0..i; needs Nq == Nk.
        kv_lengths: int [B], keys from this index on are padding. A row of padding alone gives 0.
        scale: 1/sqrt(D) if None.
        backend: "auto", "sdpa" (PyTorch's fused kernels) or "reference" (plain matmul and softmax).

    Returns:
        [B, Nq, H, D] in q's dtype.

    Raises:
        ValueError: shapes that disagree, causal with Nq != Nk, or an unknown backend.
    """
    _check(q_BNHD, k_BNHD, v_BNHD, causal, backend)
    if kv_lengths is not None and kv_lengths.shape != q_BNHD.shape[:1]:
        raise ValueError(f"kv_lengths has shape {tuple(kv_lengths.shape)}, expected ({len(q_BNHD)},)")
    keep = None if kv_lengths is None else _padding_mask(kv_lengths, k_BNHD.shape[1])
    if backend == "reference":
        return _reference(q_BNHD, k_BNHD, v_BNHD, causal, keep, scale)
    return _sdpa(q_BNHD, k_BNHD, v_BNHD, causal, keep, scale)


def _check(q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, causal: bool, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if q_BNHD.ndim != 4 or k_BNHD.ndim != 4:
        raise ValueError(f"q and k must be [B, N, H, D], got {tuple(q_BNHD.shape)} and {tuple(k_BNHD.shape)}")
    B, Nq, H, D = q_BNHD.shape
    if k_BNHD.shape != v_BNHD.shape or (k_BNHD.shape[0], *k_BNHD.shape[2:]) != (B, H, D):
        shapes = f"q {tuple(q_BNHD.shape)}, k {tuple(k_BNHD.shape)}, v {tuple(v_BNHD.shape)}"
        raise ValueError(f"q, k and v must agree in B, H, D, and k with v in N: {shapes}")
    if causal and Nq != k_BNHD.shape[1]:
        raise ValueError(f"causal needs as many queries as keys, got {Nq} and {k_BNHD.shape[1]}")


def _padding_mask(kv_lengths: Tensor, Nk: int) -> Tensor:
    """bool [B, 1, 1, Nk], True where the key is real."""
    return (torch.arange(Nk, device=kv_lengths.device) < kv_lengths[:, None])[:, None, None]


def _reference(q_BNHD, k_BNHD, v_BNHD, causal, keep, scale) -> Tensor:
    scale = q_BNHD.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q_BNHD.dtype, torch.float32)  # softmax in fp32 at least
    scores_BHNN = torch.einsum("bqhd,bkhd->bhqk", q_BNHD.to(wide), k_BNHD.to(wide)) * scale
    hidden = torch.zeros_like(scores_BHNN, dtype=torch.bool)
    if causal:
        hidden = hidden | torch.ones_like(hidden[0, 0]).triu(1)
    if keep is not None:
        hidden = hidden | ~keep
    # exp(-inf - -inf) is NaN: a row without keys takes finite scores, then zero weights.
    scores_BHNN = scores_BHNN.masked_fill(hidden, torch.finfo(scores_BHNN.dtype).min)
    weights_BHNN = scores_BHNN.softmax(-1).masked_fill(hidden, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights_BHNN, v_BNHD.to(wide)).to(q_BNHD.dtype)


def _sdpa(q_BNHD, k_BNHD, v_BNHD, causal, keep, scale) -> Tensor:
    if causal and keep is not None:
        Nq = q_BNHD.shape[1]
        keep = keep & torch.ones(Nq, Nq, dtype=torch.bool, device=keep.device).tril()
        causal = False
    q_BHND, k_BHND, v_BHND = (x.transpose(1, 2) for x in (q_BNHD, k_BNHD, v_BNHD))
    out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=keep, is_causal=causal, scale=scale)
    if keep is not None:  # PyTorch's kernels differ on rows without a key
        out_BHND = out_BHND.masked_fill(~keep.any(-1, keepdim=True), 0.0)
    return out_BHND.transpose(1, 2)
