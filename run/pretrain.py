#!/usr/bin/env python3
"""Pre-train MUG on image-text pairs with DeepSpeed.

    deepspeed run/pretrain.py --deepspeed ds_configs/zero3.json

trains on the embedded default. A recipe can be named, and any of its keys changed:

    deepspeed run/pretrain.py --deepspeed ds_configs/zero3.json --config run/recipes/cc3m_base.yaml \
        --data.shards 'cc3m/{00000..00331}.tar' --trainer.max_steps 100 --output runs/try

The same command again goes on where the run stopped. `torchrun` and plain `python` start it too.
"""

import dataclasses

import torch
import torch.distributed as dist

from mug.data.ledger import Ledger
from mug.data.stream import Batch, TrainStream, open_held_out, open_train
from mug.model.flops import flops_per_sample
from mug.model.mug import OBJECTIVES
from mug.model.presets import Vocabulary
from mug.run.evaluation.neighbours import Neighbours
from mug.run.training import hardware
from mug.run.training.checkpoint import Checkpoint
from mug.run.training.console import Console, run_command
from mug.run.training.engine import whole_weights
from mug.run.training.errors import RunError
from mug.run.training.evaluation import HeldOut
from mug.run.training.loop import Log, Run, introduce, one_line, train
from mug.run.training.losses import Means
from mug.run.training.metrics import logged_losses
from mug.run.training.phases import Phases
from mug.run.training.recipe import Command, Recipe, count_steps, parse_command
from mug.run.training.recovery import go_back, skip_or_stop
from mug.run.training.restore import describe_model
from mug.run.training.spikes import SpikeAlarm
from mug.run.training.start import open_output, prepare, start_engine, watched_ranks


def main(console: Console) -> None:
    # --- Parse: all that can be refused is refused here, before anything is written ---
    phases = Phases()
    phases.end("imports")
    command = parse_command()
    recipe = command.recipe
    share, ds_config = prepare(command, recipe.model.width, phases)

    # --- Data ---
    sizes = recipe.model.image_size, recipe.model.text_length
    stream = open_train(recipe.data, recipe.seed, *sizes, share)
    pairs = open_held_out(recipe.data, *sizes)
    neighbours = Neighbours(recipe.trainer.knn, recipe.data.cache, sizes[0]) if recipe.trainer.knn else None
    steps = count_steps(recipe.trainer, stream.samples)
    phases.end("data")

    with watched_ranks(console, recipe.safety.hang_minutes, phases) as watch:
        # --- Model, and the newest whole checkpoint, if this output has one of this model ---
        model = build_objective(recipe, vocabulary_of(stream))
        phases.end("model")
        description = describe_model(recipe.objective, model)
        resumed = open_output(command, description, console, phases)

        # --- Engine, data and ledger as they were then ---
        engine = start_engine(model, ds_config, recipe.trainer, resumed, phases)
        if resumed:
            stream.load_state_dict(resumed.manifest["data"])
        ledger = open_ledger(command, stream, resumed)

        # --- Loop ---
        held_out = None if pairs is None else HeldOut(pairs, recipe.trainer, recipe.data.workers)
        files = {"tokenizer.json": stream.tokenizer.to_json()}
        task = Pretraining(recipe, description, files, neighbours, open_alarm(command, resumed))
        run = Run(command, engine, task, stream, ledger, held_out, steps, console, phases, watch)
        introduce(run, resumed, f"{recipe.objective} {recipe.model.preset}", "pairs")
        train(run, resumed)


# --- Model ------------------------------------------------------------------------------------------------


def vocabulary_of(stream: TrainStream) -> Vocabulary:
    t = stream.tokenizer
    return Vocabulary(size=t.vocab_size, pad=t.pad, bos=t.bos, eos=t.eos, mask=t.mask)


def build_objective(recipe: Recipe, vocabulary: Vocabulary) -> torch.nn.Module:
    """The objective with freshly drawn weights, the same on all ranks and for all ZeRO stages."""
    if recipe.objective not in OBJECTIVES:
        raise RunError(f"objective {recipe.objective!r} is not one of {', '.join(OBJECTIVES)}")
    objective = OBJECTIVES[recipe.objective]
    if set(recipe.loss_weights) != set(objective.terms):
        raise RunError(
            f"loss_weights names {', '.join(recipe.loss_weights)}; {recipe.objective} has {', '.join(objective.terms)}"
        )
    if not recipe.weighted:
        raise RunError("loss_weights are all 0: nothing would be trained; give a loss some weight")
    torch.manual_seed(recipe.seed)
    return objective(recipe.model, vocabulary, recipe.seed, tuple(recipe.weighted))


# --- What went wrong so far -------------------------------------------------------------------------------


def open_ledger(command: Command, stream: TrainStream, resumed: Checkpoint | None) -> Ledger:
    """The run's list of samples that could not be used; rank 0 keeps it."""
    data = command.recipe.data
    ledger = Ledger(command.output / "ledger.jsonl", stream.samples, data.max_bad_samples, data.max_bad_in_shard)
    state = resumed.manifest["data"]["ledger"] if resumed else ledger.state_dict()
    hardware.on_rank_zero(lambda: ledger.load_state_dict(state))
    return ledger


def open_alarm(command: Command, resumed: Checkpoint | None) -> SpikeAlarm:
    """The alarm for loss spikes, which knows the losses up to the step that the run goes on after."""
    last = resumed.step if resumed else 0
    losses = hardware.on_rank_zero(lambda: logged_losses(command.output, last))
    return SpikeAlarm(command.recipe.safety.spike_factor, losses)


# --- Task -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """What is special about pre-training, for the loop: see mug.run.training.loop.Task."""

    recipe: Recipe
    description: dict[str, dict]
    files: dict[str, str]
    neighbours: Neighbours | None
    spikes: SpikeAlarm

    @property
    def loss_weights(self) -> dict[str, float]:
        return self.recipe.weighted

    def step_flops(self, micro_batches: list[Batch]) -> float:
        """FLOP of this rank's step; captions' padding is none, as the model computes nothing for it."""
        vocabulary, flops = self.description["vocabulary"], 0.0
        for batch in micro_batches:
            samples = len(batch["tokens"])
            text_tokens = int((batch["tokens"] != vocabulary["pad"]).sum()) / samples
            stages = flops_per_sample(self.recipe.model, vocabulary["size"], text_tokens, self.loss_weights)
            flops += samples * sum(stages.values())
        return flops

    def evaluate(self, run: Run, step: int, figures: dict[str, float]) -> dict[str, float]:
        """Adds a picture, and nearest neighbours, of a whole copy of the weights on rank 0."""
        run.console.say(f"step {step}  held out: {one_line(figures)}")
        weights = whole_weights(run.engine)
        if weights is not None:
            objective = run.engine.module
            copy = type(objective)(objective.config, objective.vocabulary, objective.seed, objective.terms)
            copy.load_state_dict(weights)
            run.held_out.draw(copy, run.command.output / "samples" / f"step-{step}.png")
            if self.neighbours:
                run.watch.at(f"step {step}, nearest neighbours")
                figures["accuracy/knn"] = self.neighbours.accuracy(copy.encoder)
                run.console.say(f"step {step}  nearest neighbours: {100 * figures['accuracy/knn']:.2f}% top-1")
        dist.barrier()
        return figures

    def check_loss(self, run: Run, log: Log, step: int, loss: float) -> None:
        """Go back before a loss spike."""
        if self.spikes.check(loss):
            go_back(run, log, step, loss)

    def not_finite(self, run: Run, log: Log, step: int, micro_batches: list[Batch], means: Means) -> None:
        """Do as safety.nonfinite says, and write down how to see it again."""
        skip_or_stop(run, log, step, micro_batches, means)


if __name__ == "__main__":
    run_command(main)
