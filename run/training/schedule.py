"""The learning rate as a function of samples seen: no state to save."""

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[float], float]
NOTICEABLE = 0.05  # a smaller change of the learning rate is not worth a warning


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up over `warmup` samples to `peak`, then half a cosine to `minimum` at `total` samples."""

    peak: float
    minimum: float
    warmup: int
    total: int

    def __call__(self, samples: float) -> float:
        """Learning rate after `samples`. A step asks at its middle: at its ends, the last or the first would be 0."""
        if samples < self.warmup:
            return self.peak * samples / self.warmup
        return self.minimum + (self.peak - self.minimum) * self.share(samples)

    def share(self, samples: float) -> float:
        """Returns how much is left of the way from `peak` to `minimum`, 1 at the end of the warm-up."""
        progress = (samples - self.warmup) / max(self.total - self.warmup, 1)
        return (1 + math.cos(math.pi * min(progress, 1.0))) / 2


@dataclass(frozen=True)
class LinearSchedule(CosineSchedule):
    """Linear warm-up over `warmup` samples to `peak`, then a straight line to `minimum` at `total` samples."""

    def share(self, samples: float) -> float:
        return max(self.total - samples, 0) / max(self.total - self.warmup, 1)


SCHEDULES = {"cosine": CosineSchedule, "linear": LinearSchedule}


def jump(before: Schedule, now: Schedule, step: int, global_batch: int) -> str | None:
    """Returns a warning if the learning rate after `step` jumps, as it was to follow `before` and follows `now`; None
    where the two do not differ by more than 5%."""
    after, meant = (schedule((step + 0.5) * global_batch) for schedule in (now, before))
    if math.isclose(after, meant, rel_tol=NOTICEABLE):
        return None
    last = before((step - 0.5) * global_batch)
    return f"the learning rate jumps from {last:.1e} at step {step} to {after:.1e} at step {step + 1}"
