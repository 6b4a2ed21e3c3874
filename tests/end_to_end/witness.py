"""Run a command and write down what it trains on: python witness.py run/pretrain.py OPTIONS.

Each rank appends a line for each micro-batch, its positions, to $WITNESS/rank-RANK.
"""

import os
import runpy
import sys

from torch import Tensor

from mug.model.objectives.mug import MUG

forward = MUG.forward


def witnessed(self: MUG, batch: dict[str, Tensor]):
    if self.training:
        with open(f"{os.environ['WITNESS']}/rank-{os.environ['RANK']}", "a", encoding="utf-8") as file:
            print(*batch["position"].tolist(), file=file)
    return forward(self, batch)


if __name__ == "__main__":
    MUG.forward = witnessed
    launched = sys.argv[1:]  # DeepSpeed's launcher puts an option of its own before the script
    sys.argv = sorted(launched, key=lambda argument: not (argument.startswith("run/") and argument.endswith(".py")))
    runpy.run_path(sys.argv[0], run_name="__main__")
