#!/usr/bin/env python3
"""Replay a step whose loss or gradient was not finite, and compare.

    python run/replay.py runs/NAME/replay/step-N.json
    torchrun --nproc-per-node 8 run/replay.py runs/NAME/replay/step-N.json

takes the checkpoint of the state before the step and the micro-batches of all ranks, shares them among the ranks that
there are now, and prints the losses of each that is not finite, now and in the run. Nothing is updated or written.
An objective that compares the samples of all ranks takes as many ranks as the run had.
Status 0 means that all losses were reproduced, 1 that one was not.
"""

import math
from pathlib import Path

import torch
from jsonargparse import Namespace

from mug.data.loader import load
from mug.data.stream import BatchShard, TrainStream
from mug.model.objectives.objective import CoupledObjective
from mug.run.cluster import hardware
from mug.run.cluster.losses import WeightedMeans
from mug.run.common.command_line import Parser
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RunError
from mug.run.state import checkpoint
from mug.run.state import replay_bundle as bundle
from mug.run.state.replay_bundle import Bundle, MicroBatch
from mug.run.state.sharded_state import SavedState, load_weights
from mug.run.training.deepspeed_config import load_deepspeed_config
from mug.run.training.engine import build_engine, recipe_values
from mug.run.training.groups import parameter_groups
from mug.run.training.recipe import Recipe
from mug.run.training.start import build_model, open_stream
from mug.run.training.step import train_step


def main(console: Console) -> None:
    options = parse()
    rank, world = hardware.rank_and_world()
    hardware.limit_threads()
    replayed = bundle.read(options.bundle)
    if len(replayed.micro_batches) % world:
        raise RunError(f"{len(replayed.micro_batches)} micro-batches cannot be shared among {world} ranks; start one")
    recipe = Recipe.from_dict(replayed.recipe)
    values = recipe_values(recipe.trainer, recipe.model.width, world)
    ds_config = load_deepspeed_config(options.deepspeed or replayed.deepspeed, values)
    trainer = recipe.trainer
    stream = open_stream(recipe, BatchShard(trainer.global_batch, trainer.micro_batch, rank, world, trainer.groups))
    hardware.init_distributed()
    model = build_model(recipe, stream.source, bool(replayed.checkpoint), console)
    load_state(model, stream, replayed, options.bundle.parents[1])
    engine = build_engine(model, ds_config, trainer, parameter_groups(model, trainer, recipe.rates))

    if isinstance(model, CoupledObjective) and world != replayed.world_size:
        raise RunError(
            f"{recipe.objective} compares the samples of all ranks with each other: start {replayed.world_size} ranks,"
            f" as the run had, not {world}"
        )
    mine = sorted(replayed.micro_batches, key=lambda one: one.positions)[rank::world]  # group by group
    batches = [batch for batch, _ in load(stream.source, [range(*one.positions) for one in mine], workers=0)]
    means = train_step(engine, batches, recipe.active_losses, groups=trainer.groups)
    same = compare(console, replayed, mine, means)
    what, count = "is finite" if engine.was_step_applied() else "is not finite", len(replayed.micro_batches)
    console.info(
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
    """Load the weights before the step, and check that positions mean the same samples.

    Raises:
        RunError: the checkpoint is missing or damaged.
        DataError: the shards have changed.
    """
    if replayed.checkpoint:
        found = hardware.on_rank_zero(lambda: find_state(output / replayed.checkpoint))
        load_weights(model, SavedState(found.folder))
        stream.load_state_dict(found.manifest["data"])


def find_state(folder: Path) -> checkpoint.Checkpoint:
    """Returns the checkpoint of the state before the step.

    Raises:
        RunError: it is missing or damaged.
    """
    if not folder.is_dir():
        raise RunError(
            f"{folder}, the state before the step, is missing; restore it there. A run keeps it as long as the bundle"
            " stays in its folder replay/"
        )
    return checkpoint.verify(folder)


def compare(console: Console, replayed: Bundle, mine: list[MicroBatch], means: WeightedMeans) -> int:
    """Print the losses of the micro-batches that are not finite; returns how many, of all, are as they were."""
    outcomes = []
    for then, losses in zip(mine, means.micro_batches, strict=True):
        now = {term: loss.item() for term, loss in losses.items()}
        finite = all(map(math.isfinite, [*now.values(), *then.losses.values()]))
        same = all(_same(now[term], loss) for term, loss in then.losses.items())
        line = ", ".join(f"{term} {now[term]!r} ({loss!r} in the run)" for term, loss in then.losses.items())
        outcomes.append((same, None if finite and same else f"{then}: {line}"))
    outcomes = hardware.gather(outcomes)
    for _, line in outcomes:
        if line:
            console.info(line)
    return sum(same for same, _ in outcomes)


def _same(now: float, then: float) -> bool:
    """Whether two losses agree up to the rounding of another number of ranks or another device."""
    return (math.isnan(now) and math.isnan(then)) or math.isclose(now, then, rel_tol=1e-3)


if __name__ == "__main__":
    run_command(main)
