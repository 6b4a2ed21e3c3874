#!/usr/bin/env python3
"""Fine-tune an encoder end to end on labelled images, with MAE's recipe, or on questions about images, on DeepSpeed.

    deepspeed run/finetune.py --deepspeed ds_configs/zero1.json --config run/recipes/classify/imagenet1k_base.yaml \
        --init runs/web200m_base --data.images imagenet
    python run/finetune.py --deepspeed ds_configs/zero1.json --init runs/NAME      # Fashion-MNIST
    python run/finetune.py --deepspeed ds_configs/zero1.json --config run/recipes/answer/statements_tiny.yaml \
        --data.tokenizer runs/unix2/checkpoint-380

--init names a pre-training run, one of its checkpoints (written by any number of ranks, under any ZeRO stage), or a
file in timm's, MAE's or transformers' layout; without it, training starts from scratch. The same command again resumes
where the run stopped. Any key of the recipe can be changed: python run/finetune.py --help.
"""

from mug.run.common.console import Console, run_command
from mug.run.training.recipe import RECIPES
from mug.run.training.start import train_command

DEFAULT_RECIPE = RECIPES / "classify" / "fashion_mnist_tiny.yaml"


def main(console: Console) -> None:
    train_command(console, "finetune.py", "Fine-tune an encoder end to end on labelled images.", DEFAULT_RECIPE)


if __name__ == "__main__":
    run_command(main)
