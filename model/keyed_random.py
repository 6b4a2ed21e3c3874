"""Random choices about a sample as pure functions of (seed, position), the same on every device.

Neither rank, worker nor step enters, so a run draws the same masks on any number of devices.
Dimension letters: B batch, N patches, K visible, M = N - K masked.
"""

from typing import TypeVar

import torch
from torch import Tensor

# Odd 64-bit constants of SplitMix64 (Steele et al., 2014), as signed integers: torch has no uint64 arithmetic.
_GAMMA, _MIX_1, _MIX_2 = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
Bits = TypeVar("Bits", Tensor, int)


def _shift_right(x: Bits, bits: int) -> Bits:
    """Logical shift of int64; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Bits) -> Bits:
    """Returns SplitMix64's hash; of a Python integer, the lowest 64 bits are right."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _as_int64(x: int) -> int:
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def random_bits(seed: int, purpose: int, position_B: Tensor, count: int) -> Tensor:
    """Returns int64 [B, count] of uniform 63-bit values, a hash of (seed, purpose, position, index).

    Args:
        purpose: a small constant that separates the streams of two uses.
        position_B: int64 [B], the samples' places in the global order.
    """
    # On the host: a constant made as a tensor would be copied to a GPU, and the host would wait for it.
    key = _as_int64(_mix((seed * 2**8 + purpose) % 2**63 * _GAMMA))
    row_B = _mix(position_B * _GAMMA + key)
    index_N = torch.arange(1, count + 1, device=position_B.device) * _GAMMA
    return _shift_right(_mix(row_B[:, None] + index_N), 1)


# Purposes.
MASK, WORDS, WORD_KIND, DROP_PATH, DROP_CHANNEL = range(5)
PARALLEL, PREFIX, BLOCKS, CONTEXT, KEPT, SPLIT, MISMATCH = range(16, 23)


def random_masking(seed: int, position_B: Tensor, patches: int, visible: int) -> tuple[Tensor, Tensor]:
    """Returns int64 (visible [B, K], masked [B, M]): a uniform random split of the patches of each sample."""
    order_BN = random_bits(seed, MASK, position_B, patches).argsort(dim=1, stable=True)
    return order_BN[:, :visible], order_BN[:, visible:]
