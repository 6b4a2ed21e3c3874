"""The common parts of both attention kernels (small and tiled).

Every tensor comes as rows [R, H, D] (dense batches laid end to end) with a stride between rows and heads side by side.
A head of D values moves as a main part of D1 = 16, 32, 64 or 128 columns and a tail of D2 (0: none), so that 80 is
64 + 16, and 88 is 64 + 32 with the last 8 masked: padding to 128 would cost up to 1.6 times the products and registers.

Dimension letters: I queries, J keys of a tile, D head dimension.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp is two


def split_head(D: int) -> tuple[int, int]:
    """(D1, D2): powers of two of at least 16, which tl.dot needs, that together hold D columns; D2 may be 0."""
    main = max(16, 1 << (D.bit_length() - 1))
    return main, 0 if main >= D else max(16, triton.next_power_of_2(D - main))


@triton.jit
def sequence(b, cu_seqlens, N, PACKED: tl.constexpr):
    """(first row, number of rows) of sequence b."""
    if PACKED:
        start = tl.load(cu_seqlens + b)
        return start.to(tl.int64), tl.load(cu_seqlens + b + 1) - start
    else:
        return b.to(tl.int64) * N, N


@triton.jit
def real_keys(b, kv_lengths, count, PADDED: tl.constexpr):
    """How many of the sequence's `count` keys are not padding."""
    if PADDED:
        return tl.minimum(tl.load(kv_lengths + b).to(tl.int32), count)
    else:
        return count


@triton.jit
def load_head(base, row, stride, real, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Rows of one head, as main part and tail (the main part again where there is no tail); 0 where not real."""
    main = _load_columns(base, row, stride, real, D, 0, D1)
    tail = main
    if D2:
        tail = _load_columns(base, row, stride, real, D, D1, D2)
    return main, tail


@triton.jit
def _load_columns(base, row, stride, real, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    d = FIRST + tl.arange(0, WIDTH)
    mask = real[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (d < D)[None, :]
    return tl.load(base + row[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_head(base, row, stride, real, main, tail, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    _store_columns(base, row, stride, real, main, D, 0, D1)
    if D2:
        _store_columns(base, row, stride, real, tail, D, D1, D2)


@triton.jit
def _store_columns(base, row, stride, real, x, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    d = FIRST + tl.arange(0, WIDTH)
    mask = real[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (d < D)[None, :]
    tl.store(base + row[:, None] * stride + d[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """fp32 accumulators of a head's two parts."""
    main = tl.zeros([ROWS, D1], tl.float32)
    tail = main
    if D2:
        tail = tl.zeros([ROWS, D2], tl.float32)
    return main, tail


@triton.jit
def dot_heads(a, a_tail, b, b_tail, D2: tl.constexpr):
    """a bᵀ over the head dimension, in fp32."""
    product = tl.dot(a, tl.trans(b), input_precision="ieee")
    if D2:
        product = tl.dot(a_tail, tl.trans(b_tail), product, input_precision="ieee")
    return product


@triton.jit
def add_weighted(total, total_tail, weights, x, x_tail, D2: tl.constexpr):
    """total + weights x, where the weights are rounded to x's dtype, as the tensor cores want them."""
    weights = weights.to(x.dtype)
    total = tl.dot(weights, x, total, input_precision="ieee")
    if D2:
        total_tail = tl.dot(weights, x_tail, total_tail, input_precision="ieee")
    return total, total_tail


@triton.jit
def visible(i, j, keys, CAUSAL: tl.constexpr):
    """bool, broadcast over query indices i and key indices j: may i see j?"""
    if CAUSAL:
        return (j < keys) & (j <= i)
    else:
        return j < keys
