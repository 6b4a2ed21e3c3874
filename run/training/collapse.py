"""Collapse of a joint embedding: its outputs become alike, which the loss does not show."""

from collections.abc import Mapping

FLOORS = {"std": 0.2, "rank": 2.0}  # of the metrics of mug.model.heads.spread
MIN_LOW = 3  # logged steps in a row


class CollapseAlarm:
    """Watches the metrics `std/LOSS` and `rank/LOSS` of the logged steps."""

    def __init__(self):
        self.low, self.warned = 0, False

    def check(self, metrics: Mapping[str, float | None]) -> str | None:
        """Returns a warning, once, after some logged steps in a row with a metric below its floor."""
        low = [name for name, value in metrics.items() if value is not None and is_low(name, value)]
        self.low = self.low + 1 if low else 0
        if self.warned or self.low < MIN_LOW:
            return None
        self.warned = True
        found = ", ".join(f"{name} {metrics[name]:.2f} (floor {FLOORS[name.partition('/')[0]]:g})" for name in low)
        return f"the outputs have collapsed: {found}; lower the learning rate, or enlarge the batch"


def is_low(name: str, value: float) -> bool:
    """Returns whether a metric, `std…` or `rank…`, is below its floor."""
    return value < FLOORS.get(name.partition("/")[0], -float("inf"))
