"""What each of a sequence of groups is drawn from, by shares that hold at any time.

The k-th group is of the stream into whose share of [0, 1) the point {β + k·α} falls: α is the golden ratio's
fraction, whose multiples keep every share to within 5 groups at any time of the first million, and β depends on the
seed. How many of the groups before were of that stream is a sum of rounded-down multiples, found in O(log k) steps of
integers.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

from mug.data import rng

ONE = 2**64
STEP = 0x9E3779B97F4A7C15  # α·2^64, odd


def locate(weights: Sequence[float], seed: int, group: int) -> tuple[int, int]:
    """Returns the stream that a group is of, and how many groups before it were of that stream.

    A pure function of the arguments, in less than a millisecond whatever `group` is. weights: positive.
    """
    bounds = _bounds(tuple(weights))
    offset = int(rng.raw(seed, rng.MIXTURE, 0, 0, 1)[0])
    stream = bisect_right(bounds, (offset + group * STEP) % ONE) - 1
    return stream, _points_below(bounds[stream + 1], offset, group) - _points_below(bounds[stream], offset, group)


def drawn(weights: Sequence[float], seed: int, groups: int) -> list[int]:
    """Returns how many of the first groups are of each stream."""
    offset = int(rng.raw(seed, rng.MIXTURE, 0, 0, 1)[0])
    below = [_points_below(bound, offset, groups) for bound in _bounds(tuple(weights))]
    return [end - start for start, end in pairwise(below)]


@lru_cache(maxsize=64)
def _bounds(weights: tuple[float, ...]) -> list[int]:
    """Where the shares of the streams begin on [0, 2^64], and where the last one ends."""
    total = math.fsum(weights)
    return [0, *(round(ONE * (end / total)) for end in accumulate(weights[:-1])), ONE]


def _points_below(bound: int, offset: int, count: int) -> int:
    """How many of the first `count` points, (offset + i·STEP) mod ONE, are less than `bound`.

    ⌊y⌋ - ⌊y - b⌋ is 1 where the fraction of y is less than b, and 0 elsewhere; y is the i-th point before `mod`.
    """
    return _floor_sum(count, offset) - _floor_sum(count, offset - bound + ONE) + count


def _floor_sum(count: int, offset: int) -> int:
    """Σ ⌊(offset + i·STEP) / ONE⌋ over i < count, by the steps of Euclid's algorithm."""
    total, step, modulus = 0, STEP, ONE
    while count:
        total += count * (count - 1) // 2 * (step // modulus) + count * (offset // modulus)
        step, offset = step % modulus, offset % modulus
        top = step * count + offset
        count, offset, step, modulus = top // modulus, top % modulus, modulus, step
    return total
