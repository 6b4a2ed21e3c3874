"""Confidence intervals of an accuracy, over the seeds and over the test images; and of any metric, by bootstrap."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

Z = 1.959964  # 97.5% of the normal distribution
# 97.5% of Student's t with 1, 2, … 9 degrees of freedom: up to ten seeds.
T = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)
MAX_SEEDS = len(T) + 1
RESAMPLES = 1000  # of a bootstrap


def bootstrap(values_NS: np.ndarray) -> np.ndarray:
    """Returns float64 [RESAMPLES, S], the sums of the values over N items drawn with replacement, always the same ones:
    what is computed from columns of one call is paired."""
    random, count = np.random.default_rng(0), len(values_NS)
    draws = (random.integers(0, count, count) for _ in range(RESAMPLES))
    return np.stack([np.bincount(drawn, minlength=count) @ values_NS for drawn in draws])


def interval(values_R: np.ndarray) -> tuple[float, float]:
    """Returns the 95% interval of a metric, given its values on the resamples; NaN does not count."""
    low, high = np.nanpercentile(values_R, (2.5, 97.5)).tolist()
    return low, high


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracies, 0..1, of the same test images with each seed."""

    values: tuple[float, ...]
    images: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Returns the standard deviation over the seeds (n - 1); None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def seed_interval(self) -> tuple[float, float] | None:
        """Returns the 95% interval of the mean over seeds (Student's t); None of a single seed."""
        if self.deviation is None:
            return None
        half = T[len(self.values) - 2] * self.deviation / math.sqrt(len(self.values))
        return self.mean - half, self.mean + half

    def test_interval(self) -> tuple[float, float]:
        """Returns the 95% interval of the mean accuracy over the draw of the test images (Wilson)."""
        n, p = self.images, self.mean
        centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return max(0.0, centre - half), min(1.0, centre + half)

    def row(self) -> dict[str, Any]:
        """Returns the values for a results file."""
        return {
            "accuracy": self.mean,
            "values": list(self.values),
            "deviation": self.deviation,
            "seeds": len(self.values),
            "seed_interval": self.seed_interval(),
            "test_interval": self.test_interval(),
            "test_images": self.images,
        }

    def __str__(self) -> str:
        """Returns, in percent, mean ± deviation over seeds, then both intervals."""
        text = f"{100 * self.mean:6.2f}"
        if self.deviation is not None and (interval := self.seed_interval()):
            text += f" ± {100 * self.deviation:.2f} ({len(self.values)} seeds, 95%: {_percent(interval)})"
        return f"{text}  95% over test images: {_percent(self.test_interval())}"


def _percent(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}"
