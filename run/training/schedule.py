"""The learning rate as a function of samples seen: no state to save."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up over `warmup` samples to `peak`, then half a cosine to `floor` at `total` samples."""

    peak: float
    floor: float
    warmup: int
    total: int

    def __call__(self, samples: float) -> float:
        """Learning rate after `samples`. A step asks at its middle: at its ends, the last or the first would be 0."""
        if samples < self.warmup:
            return self.peak * samples / self.warmup
        progress = (samples - self.warmup) / max(self.total - self.warmup, 1)
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


@dataclass(frozen=True)
class LinearSchedule:
    """Linear warm-up over `warmup` samples to `peak`, then a straight line to 0 at `total` (poly of power 1)."""

    peak: float
    warmup: int
    total: int

    def __call__(self, samples: float) -> float:
        """Learning rate after `samples`; a step asks at its middle, as above."""
        if samples < self.warmup:
            return self.peak * samples / self.warmup
        return self.peak * max(self.total - samples, 0) / max(self.total - self.warmup, 1)
