"""Preemption signals: one rank receives one, all ranks learn of it at the same step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from mug.run.cluster import hardware

# What schedulers send before they take a machine away, and what a closed terminal or a lost ssh connection does.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class PreemptionSignal:
    """Whether some rank was asked to end. All ranks call `start` and `result` once a step each, in this order.

    On a GPU nothing waits for it: the result is copied to the host while the step is computed.
    """

    def __init__(self):
        self.received = 0
        self.answered = torch.zeros(1, dtype=torch.int64, pin_memory=torch.cuda.is_available())
        self.arrived = torch.cuda.Event() if torch.cuda.is_available() else None
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has SIGHUP
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def start(self) -> None:
        number = torch.tensor([self.received]).to(hardware.device(), non_blocking=True)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        self.answered.copy_(number, non_blocking=True)
        if self.arrived:
            self.arrived.record()

    def result(self) -> str | None:
        """Returns the signal's name, if any rank had received one at `start`."""
        if self.arrived:
            self.arrived.synchronize()  # since then DeepSpeed has waited for the gradients' norm
        number = self.answered.item()
        return signal.Signals(number).name if number else None
