"""Signals to end: one rank gets one, all ranks learn of it at the same step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send before they take a machine away


class Interruption:
    """Whether some rank was asked to end. All ranks call `ask` and `answer` once a step each, in this order.

    The question travels over gloo while the step is computed: nothing waits for it, on a GPU or on a CPU.
    """

    def __init__(self):
        self.received = 0
        self.group = dist.new_group(backend="gloo")
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def ask(self) -> None:
        self.number = torch.tensor([self.received])
        self.work = dist.all_reduce(self.number, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def answer(self) -> str | None:
        """The signal's name, if any rank had received one when it asked."""
        self.work.wait()
        return signal.Signals(self.number.item()).name if self.number.item() else None
