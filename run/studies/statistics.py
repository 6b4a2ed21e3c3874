"""Is one encoder ahead of another? Paired differences, and what is left of them after noise and several questions.

Seeds are pairs: initial weights, order of samples and crops are the same for all encoders of a seed, so differences
within a seed are compared (Student's t). Test images are the second source of noise: a bootstrap draws groups of them
(all frames of an animation, for one), the same groups for both encoders. The half-widths of both sources add as the
root of the sum of squares. Where several comparisons are declared, Holm's procedure (1979) keeps the chance of any
false claim below ALPHA.

Dimension letters: S seeds, M test images, G groups, D draws.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

ALPHA = 0.05
DRAWS = 1_000  # of the bootstrap


@dataclass(frozen=True)
class Difference:
    """A mean difference.

    seed_error: standard error of the mean over seeds; None of a single seed.
    image_error: standard error over draws of the test images.
    """

    mean: float
    seeds: int
    seed_error: float | None
    image_error: float

    def half_width(self, alpha: float = ALPHA) -> float | None:
        """Returns half of the interval that covers the true difference with probability 1 - alpha; None of one seed."""
        if self.seed_error is None:
            return None
        of_seeds = float(stats.t.ppf(1 - alpha / 2, self.seeds - 1)) * self.seed_error
        return math.hypot(of_seeds, float(stats.norm.ppf(1 - alpha / 2)) * self.image_error)


def difference(ours_S: Sequence[float], theirs_S: Sequence[float], image_error: float = 0.0) -> Difference:
    """Returns ours - theirs, paired by seed: the longer list is cut to the shorter."""
    paired = [a - b for a, b in zip(ours_S, theirs_S, strict=False)]
    error = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else None
    return Difference(statistics.fmean(paired), len(paired), error, image_error)


def image_error(tasks: Sequence[tuple[np.ndarray, Sequence[str]]], draws: int = DRAWS, seed: int = 0) -> float:
    """Returns the standard error of a mean over tasks, by a bootstrap of the groups of each task's test images.

    Args:
        tasks: (value of each test image [M], such as the difference of two encoders' hits; the group of each [M]).
    """
    random = np.random.default_rng(seed)
    means = [_bootstrapped(value_M, group_M, draws, random) for value_M, group_M in tasks]
    return float(np.mean(means, axis=0).std(ddof=1))


def _bootstrapped(value_M: np.ndarray, group_M: Sequence[str], draws: int, random: np.random.Generator) -> np.ndarray:
    """Returns the mean of the values in each draw of as many groups as there are."""
    _, number_M = np.unique(np.asarray(group_M), return_inverse=True)
    size_G, sum_G = np.bincount(number_M), np.bincount(number_M, value_M)
    groups = len(size_G)
    times_DG = random.multinomial(groups, np.full(groups, 1 / groups), size=draws)
    return (times_DG @ sum_G) / (times_DG @ size_G)


def separable(differences: Sequence[Difference], alpha: float = ALPHA) -> list[tuple[float | None, bool]]:
    """Returns by Holm's procedure the half-width of each difference's interval, and whether it is separable from 0.

    The clearest difference is held to the level alpha / n, the next to alpha / (n - 1), and so on, until one of these
    intervals covers 0: from there on, none is separable, and the level stays. One seed has no half-width.
    """
    found: list[tuple[float | None, bool]] = [(None, False)] * len(differences)
    testable = [i for i, one in enumerate(differences) if one.seed_error is not None]
    order = sorted(testable, key=lambda i: _clearness(differences[i]), reverse=True)
    level, clear = alpha / max(1, len(differences)), True
    for rank, i in enumerate(order):
        if clear:
            level = alpha / (len(differences) - rank)
        half = differences[i].half_width(level)
        clear = clear and half is not None and abs(differences[i].mean) > half
        found[i] = half, clear
    return found


def _clearness(one: Difference) -> float:
    half = one.half_width() or 0.0
    return abs(one.mean) / half if half else math.inf
