#!/usr/bin/env python3
"""Fine-tune an encoder end to end on labelled images, with MAE's recipe, on DeepSpeed.

    deepspeed run/finetune.py --deepspeed ds_configs/zero1.json --config run/recipes/finetune/imagenet1k_base.yaml \
        --init runs/web200m_base --data.images imagenet
    python run/finetune.py --deepspeed ds_configs/zero1.json --init runs/NAME      # Fashion-MNIST

--init names a pre-training run, one of its checkpoints (written by any number of ranks, under any ZeRO stage), or a
file in timm's, MAE's or transformers' layout; without it, training starts from scratch. The same command again goes on
where the run stopped. Any key of the recipe can be changed: python run/finetune.py --help.
"""

import dataclasses
from typing import ClassVar

from mug.data.stream import Batch
from mug.model.classifier import Classifier
from mug.model.flops import classifier_flops
from mug.model.presets import ModelConfig
from mug.run.evaluation.datasets import open_splits
from mug.run.finetuning.groups import layer_decay_groups
from mug.run.finetuning.images import open_images
from mug.run.finetuning.initial import initial_encoder
from mug.run.finetuning.recipe import FinetuneRecipe, parse_command
from mug.run.training import checkpoint, hardware
from mug.run.training.console import Console, run_command
from mug.run.training.errors import Diverged
from mug.run.training.evaluation import HeldOut
from mug.run.training.loop import Log, Run, introduce, train
from mug.run.training.losses import Means
from mug.run.training.phases import Phases
from mug.run.training.recipe import count_steps
from mug.run.training.start import open_output, prepare, start_engine, watched_ranks


def main(console: Console) -> None:
    # --- Parse: all that can be refused is refused before anything is written ---
    phases = Phases()
    phases.end("imports")
    command = parse_command()
    recipe: FinetuneRecipe = command.recipe
    trainer, sizes = recipe.trainer, recipe.model.encoder
    share, ds_config = prepare(command, sizes.width, phases)

    # --- Data ---
    splits = open_splits(recipe.data.images, recipe.data.test, recipe.data.label, recipe.data.cache)
    stream, test = open_images(recipe, splits, share)
    steps = count_steps(trainer, stream.samples)
    phases.end("data")

    with watched_ranks(console, recipe.safety.hang_minutes, phases) as watch:
        # --- Model: of the newest whole checkpoint, if this output has one; else of the weights to begin with ---
        begun = bool(hardware.on_rank_zero(lambda: checkpoint.list_folders(command.output)))
        model = build_model(recipe, len(test.names), begun, console)
        phases.end("model")
        task = Finetuning(sizes, recipe.model.pool, test.names)
        resumed = open_output(command, task.description, console, phases)

        # --- Engine, and data as they were then ---
        groups = layer_decay_groups(model, trainer.weight_decay, trainer.layer_decay)
        engine = start_engine(model, ds_config, trainer, resumed, phases, groups)
        if resumed:
            stream.load_state_dict(resumed.manifest["data"])

        # --- Loop ---
        held_out = HeldOut(test, trainer, recipe.data.workers)
        run = Run(command, engine, task, stream, None, held_out, steps, console, phases, watch)
        introduce(run, resumed, f"classifier of {len(test.names)} classes", "images")
        if not resumed:
            console.say(f"beginning from {recipe.init or 'random weights'}")
        train(run, resumed)


def build_model(recipe: FinetuneRecipe, classes: int, begun: bool, console: Console) -> Classifier:
    """The classifier; unless the run has `begun`, its encoder with the weights to begin with. The same on all ranks."""
    sizes, of = recipe.model.encoder, recipe.model
    encoder = initial_encoder(sizes, None if begun else recipe.init, recipe.seed, console.warn)
    return Classifier(encoder, sizes, classes, of.pool, of.drop_path, recipe.seed)


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """What is special about fine-tuning, for the loop: see mug.run.training.loop.Task."""

    encoder: ModelConfig
    pool: str
    names: list[str]

    loss_weights: ClassVar[dict[str, float]] = {"class": 1.0}
    files: ClassVar[dict[str, str]] = {}

    @property
    def description(self) -> dict[str, dict]:
        return {"config": dataclasses.asdict(self.encoder), "classifier": {"pool": self.pool, "names": self.names}}

    def step_flops(self, micro_batches: list[Batch]) -> float:
        """FLOP of this rank's step, forward and backward."""
        return classifier_flops(self.encoder, len(self.names)) * sum(len(batch["image"]) for batch in micro_batches)

    def evaluate(self, run: Run, step: int, figures: dict[str, float]) -> dict[str, float]:
        """Says loss and accuracy on the test images."""
        top1, top5 = (100 * figures[name] for name in ("accuracy/class", "accuracy5/class"))
        run.console.say(f"step {step}  test: loss {figures['loss/total']:.4f}  top-1 {top1:.2f}%  top-5 {top5:.2f}%")
        return figures

    def check_loss(self, run: Run, log: Log, step: int, loss: float) -> None:
        """Any finite loss will do."""

    def not_finite(self, run: Run, log: Log, step: int, micro_batches: list[Batch], means: Means) -> None:
        """Stop; what was saved stays."""
        log.saver.finish()
        raise Diverged(f"loss or gradient of step {step} is not finite; nothing was updated")


if __name__ == "__main__":
    run_command(main)
