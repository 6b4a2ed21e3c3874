#!/usr/bin/env python3
"""Pre-train an objective on image-text pairs with DeepSpeed.

    deepspeed run/pretrain.py --deepspeed ds_configs/zero3.json

trains MUG on the embedded default. A recipe can be named, and any of its keys changed:

    deepspeed run/pretrain.py --deepspeed ds_configs/zero3.json --config run/recipes/mug/cc3m_base.yaml \
        --data.shards 'cc3m/{00000..00331}.tar' --trainer.max_steps 100 --output runs/try

The same command again resumes where the run stopped. `torchrun` and plain `python` start it too.
"""

from mug.run.common.console import Console, run_command
from mug.run.training.recipe import RECIPES
from mug.run.training.start import train_command

DEFAULT_RECIPE = RECIPES / "mug" / "compositions_tiny.yaml"


def main(console: Console) -> None:
    train_command(console, "pretrain.py", "Pre-train an objective on image-text pairs.", DEFAULT_RECIPE)


if __name__ == "__main__":
    run_command(main)
