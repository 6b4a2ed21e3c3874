"""Attention of short sequences: one program holds an entire head, so there is no online softmax and no second pass.

Roofline at N = 50, D = 64, bf16, for one head: forward reads q, k, v and writes out (4·N·D·2 = 25.6 kB) for 4·N²·D =
0.64 MFLOP, 25 FLOP a byte; backward reads q, k, v, dout and writes dq, dk, dv (44.8 kB) for 10·N²·D = 1.6 MFLOP,
36 FLOP a byte. An H100 needs about 300 before its tensor cores are the limit: memory is, and every byte moves once.
Hence backward takes rowsum(P ∘ dP) rather than rowsum(dout ∘ out), which would read `out`. It needs no atomics: all
queries of a key are in the program.

N = 65 to 128 takes blocks of 128 rows: up to four times the scores that count, as 64-tiles would, but in one pass.
"""

import triton
import triton.language as tl

from mug.kernels.attention_triton import (
    LOG2_E,
    add_weighted,
    dot_heads,
    load_head,
    real_keys,
    sequence,
    store_head,
    visible,
    zeros,
)


@triton.jit(do_not_specialize=["Nq", "Nk", "rows", "H"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    kv_lengths,
    q_stride,
    k_stride,
    Nq,
    Nk,
    rows,
    H,
    scale,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    q_start, q_count = sequence(b, cu_seqlens_q, Nq, PACKED)
    k_start, k_count = sequence(b, cu_seqlens_k, Nk, PACKED)
    keys = real_keys(b, kv_lengths, k_count, PADDED)
    i, j = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    q_ID, q_tail = load_head(q + q_start * q_stride + h * D, i, q_stride, i < q_count, D, D1, D2)
    k_JD, k_tail = load_head(k + k_start * k_stride + h * D, j, k_stride, j < keys, D, D1, D2)
    v_JD, v_tail = load_head(v + k_start * k_stride + h * D, j, k_stride, j < keys, D, D1, D2)

    s_IJ = dot_heads(q_ID, q_tail, k_JD, k_tail, D2) * (scale * LOG2_E)
    s_IJ = tl.where(visible(i[:, None], j[None, :], keys, CAUSAL), s_IJ, float("-inf"))
    top_I = tl.max(s_IJ, 1)
    shift_I = tl.where(top_I == float("-inf"), 0.0, top_I)  # without any key: exp2(-inf - -inf) would be NaN
    p_IJ = tl.exp2(s_IJ - shift_I[:, None])
    sum_I = tl.sum(p_IJ, 1)
    out_ID, out_tail = zeros(BLOCK_Q, D1, D2)
    out_ID, out_tail = add_weighted(out_ID, out_tail, p_IJ, v_JD, v_tail, D2)
    sum_I = tl.where(sum_I == 0.0, 1.0, sum_I)
    out_base = out + q_start * H * D + h * D
    store_head(out_base, i, H * D, i < q_count, out_ID / sum_I[:, None], out_tail / sum_I[:, None], D, D1, D2)
    tl.store(lse + h * rows.to(tl.int64) + q_start + i, top_I + tl.log2(sum_I), mask=i < q_count)


@triton.jit(do_not_specialize=["Nq", "Nk", "rows", "H"])
def backward_kernel(
    q,
    k,
    v,
    dout,
    lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    kv_lengths,
    q_stride,
    k_stride,
    Nq,
    Nk,
    rows,
    H,
    dq_stride,
    dk_stride,
    scale,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    q_start, q_count = sequence(b, cu_seqlens_q, Nq, PACKED)
    k_start, k_count = sequence(b, cu_seqlens_k, Nk, PACKED)
    keys = real_keys(b, kv_lengths, k_count, PADDED)
    i, j = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    wide = H * D  # stride between rows of dout
    q_ID, q_tail = load_head(q + q_start * q_stride + h * D, i, q_stride, i < q_count, D, D1, D2)
    k_JD, k_tail = load_head(k + k_start * k_stride + h * D, j, k_stride, j < keys, D, D1, D2)
    v_JD, v_tail = load_head(v + k_start * k_stride + h * D, j, k_stride, j < keys, D, D1, D2)
    dout_ID, dout_tail = load_head(dout + q_start * wide + h * D, i, wide, i < q_count, D, D1, D2)
    lse_I = tl.load(lse + h * rows.to(tl.int64) + q_start + i, mask=i < q_count, other=0.0)

    s_IJ = dot_heads(q_ID, q_tail, k_JD, k_tail, D2) * (scale * LOG2_E)
    p_IJ = tl.where(visible(i[:, None], j[None, :], keys, CAUSAL), tl.exp2(s_IJ - lse_I[:, None]), 0.0)
    dv_JD, dv_tail = zeros(BLOCK_K, D1, D2)
    dv_JD, dv_tail = add_weighted(dv_JD, dv_tail, tl.trans(p_IJ), dout_ID, dout_tail, D2)
    store_head(dv + k_start * dk_stride + h * D, j, dk_stride, j < k_count, dv_JD, dv_tail, D, D1, D2)

    dp_IJ = dot_heads(dout_ID, dout_tail, v_JD, v_tail, D2)
    ds_IJ = p_IJ * (dp_IJ - tl.sum(p_IJ * dp_IJ, 1)[:, None])
    dk_JD, dk_tail = zeros(BLOCK_K, D1, D2)
    dk_JD, dk_tail = add_weighted(dk_JD, dk_tail, tl.trans(ds_IJ), q_ID, q_tail, D2)
    # Scaled in fp32, after the product: dS in half precision keeps its range.
    store_head(dk + k_start * dk_stride + h * D, j, dk_stride, j < k_count, dk_JD * scale, dk_tail * scale, D, D1, D2)
    dq_ID, dq_tail = zeros(BLOCK_Q, D1, D2)
    dq_ID, dq_tail = add_weighted(dq_ID, dq_tail, ds_IJ, k_JD, k_tail, D2)
    store_head(dq + q_start * dq_stride + h * D, i, dq_stride, i < q_count, dq_ID * scale, dq_tail * scale, D, D1, D2)
