#!/usr/bin/env python3
"""Run a step again whose loss or gradient was not finite, and compare.

    python run/replay.py runs/NAME/replay/step-N.json
    torchrun --nproc-per-node 8 run/replay.py runs/NAME/replay/step-N.json

takes the checkpoint of the state before the step and the micro-batches of all ranks, shares them among the ranks that
there are now, and prints the losses of each that is not finite, now and in the run. Nothing is updated or written.
Status 0 says that all losses came out as they were, 1 that one did not.
"""

import math
from pathlib import Path

import torch
from jsonargparse import Namespace

from mug.data.loader import load
from mug.data.stream import Share, TrainStream, open_train
from mug.run.pretrain import build_objective, vocabulary_of
from mug.run.training import bundle, checkpoint, hardware
from mug.run.training.bundle import Bundle, MicroBatch
from mug.run.training.command_line import Parser
from mug.run.training.console import Console, run_command
from mug.run.training.deepspeed_config import load_deepspeed_config
from mug.run.training.engine import build_engine, recipe_values
from mug.run.training.errors import RunError
from mug.run.training.loop import train_step
from mug.run.training.losses import Means
from mug.run.training.recipe import Recipe
from mug.run.training.sharded_state import SavedState, load_weights


def main(console: Console) -> None:
    options = parse()
    rank, world = hardware.rank_and_world()
    hardware.use_cores()
    replayed = bundle.read(options.bundle)
    if len(replayed.micro_batches) % world:
        raise RunError(f"{len(replayed.micro_batches)} micro-batches cannot be shared among {world} ranks; start one")
    recipe = Recipe.from_dict(replayed.recipe)
    values = recipe_values(recipe.trainer, recipe.model.width, world)
    ds_config = load_deepspeed_config(options.deepspeed or replayed.deepspeed, values)
    share = Share(recipe.trainer.global_batch, recipe.trainer.micro_batch, rank, world)
    stream = open_train(recipe.data, recipe.seed, recipe.model.image_size, recipe.model.text_length, share)
    hardware.init_distributed()
    model = build_objective(recipe, vocabulary_of(stream))
    load_state(model, stream, replayed, options.bundle.parents[1])
    engine = build_engine(model, ds_config, recipe.trainer)

    mine = replayed.micro_batches[rank::world]
    batches = [batch for batch, _ in load(stream.pairs, [range(*one.positions) for one in mine], workers=0)]
    means = train_step(engine, batches, recipe.weighted)
    same = compare(console, replayed, mine, means)
    what, count = "is finite" if engine.was_step_applied() else "is not finite", len(replayed.micro_batches)
    console.say(
        f"step {replayed.step}: {same} of {count} micro-batches gave the losses of the run; the gradient {what}"
    )
    if same < count:
        raise SystemExit(1)


def parse() -> Namespace:
    parser = Parser(prog="replay.py", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="a file of a run's folder replay/")
    parser.add_argument("--deepspeed", type=str | None, default=None, help="DeepSpeed JSON, if not that of the run")
    return parser.parse_args()


def load_state(model: torch.nn.Module, stream: TrainStream, replayed: Bundle, output: Path) -> None:
    """The weights before the step, and a check that positions mean the same samples.

    Raises:
        RunError: the checkpoint is gone or damaged.
        DataError: the shards are others.
    """
    if replayed.checkpoint:
        found = hardware.on_rank_zero(lambda: find_state(output / replayed.checkpoint))
        load_weights(model, SavedState(found.folder))
        stream.load_state_dict(found.manifest["data"])


def find_state(folder: Path) -> checkpoint.Checkpoint:
    """The checkpoint of the state before the step.

    Raises:
        RunError: it is gone or damaged.
    """
    if not folder.is_dir():
        raise RunError(
            f"{folder}, the state before the step, is gone; put it back there. A run keeps it as long as the bundle"
            " stays in its folder replay/"
        )
    return checkpoint.verify(folder)


def compare(console: Console, replayed: Bundle, mine: list[MicroBatch], means: Means) -> int:
    """Print the losses of the micro-batches that are not finite; returns how many, of all, are as they were."""
    outcomes = []
    for then, losses in zip(mine, means.micro_batches, strict=True):
        now = {term: loss.item() for term, loss in losses.items()}
        finite = all(map(math.isfinite, [*now.values(), *then.losses.values()]))
        same = all(_same(now[term], loss) for term, loss in then.losses.items())
        told = ", ".join(f"{term} {now[term]!r} ({loss!r} in the run)" for term, loss in then.losses.items())
        outcomes.append((same, None if finite and same else f"{then}: {told}"))
    outcomes = hardware.gather(outcomes)
    for _, told in outcomes:
        if told:
            console.say(told)
    return sum(same for same, _ in outcomes)


def _same(now: float, then: float) -> bool:
    """To the rounding of another number of ranks or another device."""
    return (math.isnan(now) and math.isnan(then)) or math.isclose(now, then, rel_tol=1e-3)


if __name__ == "__main__":
    run_command(main)
