"""Run a command in which one sample gives a loss that is not finite: python poisoned.py run/pretrain.py OPTIONS.

The environment names the sample: POISON=POSITION or, to let it be infinite, POISON=POSITION:inf. Scripts that users
start know nothing of it.
"""

import os
import runpy
import sys

from torch import Tensor

from mug.model.objectives.mug import MUG

position, _, value = os.environ["POISON"].partition(":")
forward = MUG.forward


def poisoned(self: MUG, batch: dict[str, Tensor]):
    losses, report = forward(self, batch)
    if self.training and (batch["position"] == int(position)).any():
        losses["caption"] = losses["caption"] + float(value or "nan")
    return losses, report


if __name__ == "__main__":
    MUG.forward = poisoned
    launched = sys.argv[1:]  # DeepSpeed's launcher puts an option of its own before the script
    sys.argv = sorted(launched, key=lambda argument: not (argument.startswith("run/") and argument.endswith(".py")))
    runpy.run_path(sys.argv[0], run_name="__main__")
