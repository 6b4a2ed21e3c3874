#!/usr/bin/env python3
"""Fine-tune an encoder for segmentation with UperNet, as MAE does on ADE20K.

    python run/segment.py --deepspeed ds_configs/zero1.json --init runs/compositions_tiny  # embedded OpenMoji scenes
    deepspeed run/segment.py --deepspeed ds_configs/zero1.json --config run/recipes/segment/ade20k_base.yaml \
        --init runs/NAME --data.folder ADEChallengeData2016

--init names a pre-training run or what else run/finetune.py takes; without it, training starts from scratch. The same
command again resumes where the run stopped. Needs transformers (the heads) and torchmetrics.
"""

from mug.run.common.console import Console, run_command
from mug.run.common.packages import load_package
from mug.run.training.recipe import RECIPES
from mug.run.training.start import train_command

DEFAULT_RECIPE = RECIPES / "segment" / "scenes_tiny.yaml"


def main(console: Console) -> None:
    for package in ("transformers", "torchmetrics"):
        load_package(package, "eval")
    train_command(console, "segment.py", "Fine-tune an encoder with UperNet on labelled pixels.", DEFAULT_RECIPE)


if __name__ == "__main__":
    run_command(main)
