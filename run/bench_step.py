#!/usr/bin/env python3
"""Time the trainer's step against a bare PyTorch loop of the same model and batch: what does ZeRO cost?

    python run/bench_step.py --deepspeed ds_configs/zero3.json --preset tiny
    python run/bench_step.py --deepspeed ds_configs/zero3.json --preset base --batch 4 --steps 3
    python run/bench_step.py --deepspeed ds_configs/zero3.json --compile    # and with trainer.compile
    python run/bench_step.py --deepspeed ds_configs/zero1.json --preset base --batch 256    # one GPU

One rank. Both sides do forward, backward, clipping and AdamW on the same synthetic batch; they take turns, so that
a machine whose speed drifts slows both alike. Prints both medians and their ratio; with --compile also those of the
trainer whose blocks are compiled.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import Namespace

from mug.model.objectives.mug import MUG
from mug.model.objectives.objective import Batch
from mug.model.presets import PRESETS
from mug.run.benchmarks.one_rank import OneRank
from mug.run.benchmarks.synthetic import WEIGHTS
from mug.run.cluster import hardware
from mug.run.common.command_line import Parser, check_min
from mug.run.common.console import Console, run_command
from mug.run.training.groups import parameter_groups
from mug.run.training.recipe import TrainerConfig


def main(console: Console) -> None:
    options = parse()
    bench = OneRank.start(options)
    bare = bare_loop(bench.model(), bench.trainer, bench.batch)
    sides = {"bare loop": bare, "trainer": bench.step(bench.engine())}
    if options.compile:
        sides["compiled trainer"] = bench.step(bench.engine(compiled=True))
    median = {name: statistics.median(times) for name, times in take_turns(sides, options.steps).items()}
    bare_median = median.pop("bare loop")
    ratios = [f"{name} {1e3 * value:.0f} ms, ratio {value / bare_median:.3f}" for name, value in median.items()]
    console.info(
        f"{options.preset}, batch {options.batch}, {hardware.describe_device()}, {Path(options.deepspeed).name}:"
        f" bare loop {1e3 * bare_median:.0f} ms, {', '.join(ratios)} (medians of {options.steps})"
    )


def parse() -> Namespace:
    parser = Parser(prog="bench_step.py", description=__doc__.splitlines()[0])
    parser.add_argument("--deepspeed", type=str, required=True, help="DeepSpeed JSON, from ds_configs/")
    parser.add_argument("--preset", type=str, default="tiny", help=", ".join(PRESETS))
    parser.add_argument("--batch", type=int, default=64, help="samples of a step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each side, after two that are not")
    parser.add_argument("--compile", action="store_true", help="time the trainer with trainer.compile, too")
    options = parser.parse_args()
    check_min(options, {"batch": 1, "steps": 1}, "--")
    return options


def bare_loop(model: MUG, trainer: TrainerConfig, batch: Batch) -> Callable[[], None]:
    """Returns a step as PyTorch users write it, in bf16 autocast on a GPU."""
    model = model.to(hardware.device())
    groups = parameter_groups(model, trainer)
    optimizer = torch.optim.AdamW(groups, lr=trainer.learning_rate, betas=trainer.betas, fused=True)

    def step() -> None:
        with torch.autocast(hardware.device().type, torch.bfloat16, enabled=torch.cuda.is_available()):
            losses, _ = model(hardware.to_device(model.prepare(batch)))
        sum(WEIGHTS[term] * loss for term, loss in losses.items()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def take_turns(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each step, `rounds` times in turn, after two rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(2 + rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(time.perf_counter() - begin)
    return times


if __name__ == "__main__":
    run_command(main)
