"""Attention of longer sequences: FlashAttention-2's tiles (arXiv 2307.08691) with an online softmax.

Roofline at N = 257, D = 64, bf16, for one head: forward moves 4·N·D·2 = 132 kB for 4·N²·D = 16.9 MFLOP, 128 FLOP a
byte, still under the H100's 300 or so; at N = 577 it is 288, and the tensor cores take over. 64-tiles waste 20% of the
rows at 257 (5·64 = 320), 128-tiles 33% (384). Keys and values are read again by each of the 5 programs of a head, but
those follow each other and find them in L2.

Backward is deterministic, without atomics, at the price of computing the scores twice (7 products rather than 5): one
kernel goes along the keys for dq, storing rowsum(dout ∘ out) in passing; the other along the queries for dk and dv.
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


@triton.jit(do_not_specialize=["Nq", "Nk", "rows", "H", "tiles"])
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
    tiles,
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
    first, head = tl.program_id(0) % tiles * BLOCK_Q, tl.program_id(0) // tiles
    b, h = head // H, head % H
    q_start, q_count = sequence(b, cu_seqlens_q, Nq, PACKED)
    if first >= q_count:
        return
    k_start, k_count = sequence(b, cu_seqlens_k, Nk, PACKED)
    keys = real_keys(b, kv_lengths, k_count, PADDED)
    k_base, v_base = k + k_start * k_stride + h * D, v + k_start * k_stride + h * D
    i = first + tl.arange(0, BLOCK_Q)
    q_ID, q_tail = load_head(q + q_start * q_stride + h * D, i, q_stride, i < q_count, D, D1, D2)

    out_ID, out_tail = zeros(BLOCK_Q, D1, D2)
    top_I = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    sum_I = tl.zeros([BLOCK_Q], tl.float32)
    last = keys
    if CAUSAL:
        last = tl.minimum(keys, first + BLOCK_Q)
    for start in range(0, last, BLOCK_K):  # every query sees key 0: after the first turn `top_I` is finite
        j = start + tl.arange(0, BLOCK_K)
        k_JD, k_tail = load_head(k_base, j, k_stride, j < keys, D, D1, D2)
        v_JD, v_tail = load_head(v_base, j, k_stride, j < keys, D, D1, D2)
        s_IJ = dot_heads(q_ID, q_tail, k_JD, k_tail, D2) * (scale * LOG2_E)
        s_IJ = tl.where(visible(i[:, None], j[None, :], keys, CAUSAL), s_IJ, float("-inf"))
        new_top_I = tl.maximum(top_I, tl.max(s_IJ, 1))
        p_IJ = tl.exp2(s_IJ - new_top_I[:, None])
        shrink_I = tl.exp2(top_I - new_top_I)
        sum_I = sum_I * shrink_I + tl.sum(p_IJ, 1)
        out_ID = out_ID * shrink_I[:, None]
        if D2:
            out_tail = out_tail * shrink_I[:, None]
        out_ID, out_tail = add_weighted(out_ID, out_tail, p_IJ, v_JD, v_tail, D2)
        top_I = new_top_I
    sum_I = tl.where(sum_I == 0.0, 1.0, sum_I)  # without a key: out 0, and the log-sum-exp stays -inf
    out_base = out + q_start * H * D + h * D
    store_head(out_base, i, H * D, i < q_count, out_ID / sum_I[:, None], out_tail / sum_I[:, None], D, D1, D2)
    tl.store(lse + h * rows.to(tl.int64) + q_start + i, top_I + tl.log2(sum_I), mask=i < q_count)


@triton.jit(do_not_specialize=["Nq", "Nk", "rows", "H", "tiles"])
def dq_kernel(
    q,
    k,
    v,
    out,
    dout,
    lse,
    delta,
    dq,
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
    tiles,
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
    first, head = tl.program_id(0) % tiles * BLOCK_Q, tl.program_id(0) // tiles
    b, h = head // H, head % H
    q_start, q_count = sequence(b, cu_seqlens_q, Nq, PACKED)
    if first >= q_count:
        return
    k_start, k_count = sequence(b, cu_seqlens_k, Nk, PACKED)
    keys = real_keys(b, kv_lengths, k_count, PADDED)
    k_base, v_base = k + k_start * k_stride + h * D, v + k_start * k_stride + h * D
    i = first + tl.arange(0, BLOCK_Q)
    place, wide = q_start * H * D + h * D, H * D
    q_ID, q_tail = load_head(q + q_start * q_stride + h * D, i, q_stride, i < q_count, D, D1, D2)
    dout_ID, dout_tail = load_head(dout + place, i, wide, i < q_count, D, D1, D2)
    out_ID, out_tail = load_head(out + place, i, wide, i < q_count, D, D1, D2)
    delta_I = tl.sum(out_ID.to(tl.float32) * dout_ID.to(tl.float32), 1)
    if D2:
        delta_I += tl.sum(out_tail.to(tl.float32) * dout_tail.to(tl.float32), 1)
    row = h * rows.to(tl.int64) + q_start + i
    tl.store(delta + row, delta_I, mask=i < q_count)
    lse_I = tl.load(lse + row, mask=i < q_count, other=0.0)

    dq_ID, dq_tail = zeros(BLOCK_Q, D1, D2)
    last = keys
    if CAUSAL:
        last = tl.minimum(keys, first + BLOCK_Q)
    for start in range(0, last, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        k_JD, k_tail = load_head(k_base, j, k_stride, j < keys, D, D1, D2)
        v_JD, v_tail = load_head(v_base, j, k_stride, j < keys, D, D1, D2)
        s_IJ = dot_heads(q_ID, q_tail, k_JD, k_tail, D2) * (scale * LOG2_E)
        p_IJ = tl.where(visible(i[:, None], j[None, :], keys, CAUSAL), tl.exp2(s_IJ - lse_I[:, None]), 0.0)
        ds_IJ = p_IJ * (dot_heads(dout_ID, dout_tail, v_JD, v_tail, D2) - delta_I[:, None])
        dq_ID, dq_tail = add_weighted(dq_ID, dq_tail, ds_IJ, k_JD, k_tail, D2)
    store_head(dq + q_start * dq_stride + h * D, i, dq_stride, i < q_count, dq_ID * scale, dq_tail * scale, D, D1, D2)


@triton.jit(do_not_specialize=["Nq", "Nk", "rows", "H", "tiles"])
def dkdv_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
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
    dk_stride,
    tiles,
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
    first, head = tl.program_id(0) % tiles * BLOCK_K, tl.program_id(0) // tiles
    b, h = head // H, head % H
    k_start, k_count = sequence(b, cu_seqlens_k, Nk, PACKED)
    if first >= k_count:
        return
    q_start, q_count = sequence(b, cu_seqlens_q, Nq, PACKED)
    keys = real_keys(b, kv_lengths, k_count, PADDED)
    wide = H * D
    q_base, dout_base = q + q_start * q_stride + h * D, dout + q_start * wide + h * D
    j = first + tl.arange(0, BLOCK_K)
    k_JD, k_tail = load_head(k + k_start * k_stride + h * D, j, k_stride, j < keys, D, D1, D2)
    v_JD, v_tail = load_head(v + k_start * k_stride + h * D, j, k_stride, j < keys, D, D1, D2)

    dk_JD, dk_tail = zeros(BLOCK_K, D1, D2)
    dv_JD, dv_tail = zeros(BLOCK_K, D1, D2)
    begin = 0
    if CAUSAL:
        begin = first // BLOCK_Q * BLOCK_Q
    last = tl.where(first < keys, q_count, 0)  # a tile of padding gets its zeros at once
    for start in range(begin, last, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        row = h * rows.to(tl.int64) + q_start + i
        q_ID, q_tail = load_head(q_base, i, q_stride, i < q_count, D, D1, D2)
        dout_ID, dout_tail = load_head(dout_base, i, wide, i < q_count, D, D1, D2)
        lse_I = tl.load(lse + row, mask=i < q_count, other=0.0)
        delta_I = tl.load(delta + row, mask=i < q_count, other=0.0)
        # Keys stand in the rows, so that neither product below needs its weights turned.
        s_JI = dot_heads(k_JD, k_tail, q_ID, q_tail, D2) * (scale * LOG2_E)
        p_JI = tl.where(visible(i[None, :], j[:, None], keys, CAUSAL), tl.exp2(s_JI - lse_I[None, :]), 0.0)
        dv_JD, dv_tail = add_weighted(dv_JD, dv_tail, p_JI, dout_ID, dout_tail, D2)
        ds_JI = p_JI * (dot_heads(v_JD, v_tail, dout_ID, dout_tail, D2) - delta_I[None, :])
        dk_JD, dk_tail = add_weighted(dk_JD, dk_tail, ds_JI, q_ID, q_tail, D2)
    place = k_start * dk_stride + h * D
    store_head(dk + place, j, dk_stride, j < k_count, dk_JD * scale, dk_tail * scale, D, D1, D2)
    store_head(dv + place, j, dk_stride, j < k_count, dv_JD, dv_tail, D, D1, D2)
