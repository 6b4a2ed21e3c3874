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

    def __call__(self, samples: int) -> float:
        """Learning rate of the step that ends at `samples`."""
        if samples < self.warmup:
            return self.peak * samples / self.warmup
        progress = (samples - self.warmup) / max(self.total - self.warmup, 1)
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
