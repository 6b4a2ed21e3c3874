"""The Triton kernels of attention as PyTorch operators, and how they are launched.

Dimension letters: B sequences, R rows of them all (B·N in a dense batch), H heads, D head dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SMALL = 128  # longest sequence that fits in one program
SMALL_PACKED = 64  # of packed queries: most are shorter than the longest, and a tiled program ends where they do


def is_small(dtype: torch.dtype, longest_q: int, longest_k: int, packed: bool) -> bool:
    """Whether one program holds an entire head; else the tiled kernels serve, as for all of fp32 (registers)."""
    return dtype != torch.float32 and longest_q <= (SMALL_PACKED if packed else SMALL) and longest_k <= SMALL


def small_blocks(longest_q: int, longest_k: int) -> dict[str, int]:
    """BLOCK_Q, BLOCK_K and num_warps that hold these lengths: a warp for each 16 rows, as tensor cores take them."""
    block_q, block_k = (max(16, 1 << (n - 1).bit_length()) for n in (longest_q, longest_k))
    return {"BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": max(block_q, block_k) // 16}


def tiled_blocks(kernel: str, dtype: torch.dtype, D: int) -> dict[str, int]:
    """The same for "forward", "dq" and "dkdv", chosen by registers and occupancy (docs/kernels.md)."""
    if dtype == torch.float32:  # no tensor cores in IEEE precision: what is held must be small
        return {"BLOCK_Q": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    blocks = {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
    if kernel != "forward" or D > 96:  # half a tile at a time along the loop: one more program on each SM, no spills
        blocks["BLOCK_Q" if kernel == "dkdv" else "BLOCK_K"] = 32
    return blocks


@torch.library.custom_op("mug::attention", mutates_args=())
def triton_attention(
    parts: Sequence[Tensor],
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    kv_lengths: Tensor | None,
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns (out, like q; log-sum-exp of the scores in base 2, fp32 [H, R], -inf for a query without a key).

    Base 2 because backward uses exp2: another factor there would be another rounding of every probability.

    Args:
        parts: (q, k, v), (q, kv) or (qkv,), where kv is [..., 2, H, D] and qkv [..., 3, H, D]; the rest of the shape
            is [B, N, H, D], or with cu_seqlens [R, H, D].
        longest_q, longest_k: no sequence has more rows.
        The rest as in mug.kernels.attention.
    """
    q, k, v = apart(parts)
    masks = (cu_seqlens_q, cu_seqlens_k, kv_lengths)
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), _row_values(q)
    rows = _input_rows(q, k, v)
    sizes, constants = _launch_arguments(rows, masks, longest_q, longest_k, causal)
    heads = _sequences(q, cu_seqlens_q) * q.shape[-2]
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever the tensors are on
        if is_small(q.dtype, longest_q, longest_k, cu_seqlens_q is not None):
            from mug.kernels import attention_triton_small as small

            blocks = small_blocks(longest_q, longest_k)
            small.forward_kernel[(heads,)](*rows, out, lse, *sizes, scale, **constants, **blocks)
        else:
            from mug.kernels import attention_triton_tiled as tiled

            blocks = tiled_blocks("forward", q.dtype, q.shape[-1])
            tiles = -(-longest_q // blocks["BLOCK_Q"])
            tiled.forward_kernel[(tiles * heads,)](*rows, out, lse, *sizes, tiles, scale, **constants, **blocks)
    return out, lse


@triton_attention.register_fake
def _(parts, *_):
    q = apart(parts)[0]
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), _row_values(q)


@torch.library.custom_op("mug::attention_backward", mutates_args=())
def triton_attention_backward(
    dout: Tensor,
    parts: Sequence[Tensor],
    out: Tensor | None,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    kv_lengths: Tensor | None,
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
) -> list[Tensor]:
    """Returns gradients by `parts`, each written once. `out` is None for the small kernel, which does not read it."""
    q, k, v = apart(parts)
    masks = (cu_seqlens_q, cu_seqlens_k, kv_lengths)
    dparts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in parts]
    dq, dk, dv = (_as_rows(x) for x in apart(dparts))
    rows = _input_rows(q, k, v)
    sizes, constants = _launch_arguments(rows, masks, longest_q, longest_k, causal)
    heads, dout = _sequences(q, cu_seqlens_q) * q.shape[-2], dout.contiguous()
    dq_stride, dk_stride = dq.stride(0), dk.stride(0)
    with torch.cuda.device_of(q):
        if is_small(q.dtype, longest_q, longest_k, cu_seqlens_q is not None):
            from mug.kernels import attention_triton_small as small

            sizes, blocks = (*sizes, dq_stride, dk_stride), small_blocks(longest_q, longest_k)
            small.backward_kernel[(heads,)](*rows, dout, lse, dq, dk, dv, *sizes, scale, **constants, **blocks)
            return dparts
        from mug.kernels import attention_triton_tiled as tiled

        delta = torch.empty_like(lse)  # rowsum(dout ∘ out), from the first kernel to the second
        blocks = tiled_blocks("dq", q.dtype, q.shape[-1])
        tiles = -(-longest_q // blocks["BLOCK_Q"])
        tensors = (*rows, out, dout, lse, delta, dq)
        tiled.dq_kernel[(tiles * heads,)](*tensors, *sizes, dq_stride, tiles, scale, **constants, **blocks)
        blocks = tiled_blocks("dkdv", q.dtype, q.shape[-1])
        tiles = -(-longest_k // blocks["BLOCK_K"])
        tensors = (*rows, dout, lse, delta, dk, dv)
        tiled.dkdv_kernel[(tiles * heads,)](*tensors, *sizes, dk_stride, tiles, scale, **constants, **blocks)
    return dparts


@triton_attention_backward.register_fake
def _(dout, parts, *_):
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in parts]


def _save_for_backward(ctx, inputs, output) -> None:
    parts, *masks = inputs[:4]
    ctx.settings = inputs[4:]
    longest_q, longest_k, *_ = ctx.settings
    out = None if is_small(parts[0].dtype, longest_q, longest_k, masks[0] is not None) else output[0]
    ctx.save_for_backward(*parts, out, output[1], *masks)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the log-sum-exp's


def _backward(ctx, dout: Tensor, _) -> tuple[list[Tensor] | None, ...]:
    *parts, out, lse, cu_seqlens_q, cu_seqlens_k, kv_lengths = ctx.saved_tensors
    masks = (cu_seqlens_q, cu_seqlens_k, kv_lengths)
    return triton_attention_backward(dout, parts, out, lse, *masks, *ctx.settings), *(None,) * 7


triton_attention.register_autograd(_backward, setup_context=_save_for_backward)


def apart(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v, as views, of (q, k, v), (q, kv) or (qkv,)."""
    if len(parts) == 2:
        parts = (parts[0], *parts[1].unbind(-3))
    q, k, v = parts[0].unbind(-3) if len(parts) == 1 else parts
    return q, k, v


def _row_values(q: Tensor) -> Tensor:
    """Returns uninitialised fp32 [H, R]: one value for each head of each row, rows side by side."""
    return torch.empty(q.shape[-2], q.shape[:-2].numel(), dtype=torch.float32, device=q.device)


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return len(q) if cu_seqlens is None else len(cu_seqlens) - 1


def _as_rows(x: Tensor) -> Tensor:
    """Returns [R, H, D] with adjacent heads: a view where it can be, as it is of a projection's output."""
    x_RHD = x.reshape(-1, *x.shape[-2:])
    return x_RHD if x_RHD.stride()[1:] == (x.shape[-1], 1) else x_RHD.contiguous()


def _input_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns them as rows [R, H, D], where k and v have the same stride."""
    q_RHD, k_RHD, v_RHD = (_as_rows(x) for x in (q, k, v))
    if k_RHD.stride() != v_RHD.stride():
        k_RHD, v_RHD = k_RHD.contiguous(), v_RHD.contiguous()
    return q_RHD, k_RHD, v_RHD


def _launch_arguments(rows, masks, longest_q: int, longest_k: int, causal: bool) -> tuple[tuple, dict]:
    """Returns (arguments after the tensors in every kernel, up to gradient strides or numbers of tiles; constants)."""
    from mug.kernels.attention_triton import split_head

    q_RHD, k_RHD, _ = rows
    R, H, D = q_RHD.shape
    D1, D2 = split_head(D)
    sizes = (*masks, q_RHD.stride(0), k_RHD.stride(0), longest_q, longest_k, R, H)
    flags = {"CAUSAL": causal, "PACKED": masks[0] is not None, "PADDED": masks[2] is not None}
    return sizes, {**flags, "D": D, "D1": D1, "D2": D2}
