"""Run a command and write down what it trains on: python witness.py run/pretrain.py OPTIONS.

Each rank appends a line for each micro-batch of a step that is done, its positions, to $WITNESS/rank-RANK.
"""

import os
import runpy
import sys

from mug.run.training import loop

train_step = loop.train_step


def witnessed(engine, micro_batches, *args):
    means = train_step(engine, micro_batches, *args)
    with open(f"{os.environ['WITNESS']}/rank-{os.environ['RANK']}", "a", encoding="utf-8") as file:
        for batch in micro_batches:
            print(*batch["position"].tolist(), file=file)
    return means


if __name__ == "__main__":
    loop.train_step = witnessed
    launched = sys.argv[1:]  # DeepSpeed's launcher puts an option of its own before the script
    sys.argv = sorted(launched, key=lambda argument: not (argument.startswith("run/") and argument.endswith(".py")))
    runpy.run_path(sys.argv[0], run_name="__main__")
