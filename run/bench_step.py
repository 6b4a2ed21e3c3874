#!/usr/bin/env python3
"""Time the trainer's step beside a bare PyTorch loop of the same model and batch: what does ZeRO cost?

    python run/bench_step.py --deepspeed ds_configs/zero3.json --preset tiny
    python run/bench_step.py --deepspeed ds_configs/zero3.json --preset base --batch 4 --steps 3

One rank. Both sides do forward, backward, clipping and AdamW on the same synthetic batch; they take turns, so that
a machine whose speed drifts slows both alike. Prints both medians and their ratio.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import Namespace

from mug.model.mug import MUG, Batch
from mug.model.presets import PRESETS
from mug.run.benchmarks.one_rank import OneRank
from mug.run.benchmarks.synthetic import WEIGHTS
from mug.run.training import hardware
from mug.run.training.command_line import Parser
from mug.run.training.console import Console, run_command
from mug.run.training.engine import parameter_groups
from mug.run.training.errors import RunError
from mug.run.training.recipe import TrainerConfig


def main(console: Console) -> None:
    options = parse()
    bench = OneRank.start(options)
    bare = bare_loop(bench.model(), bench.trainer, bench.batch)
    engine = bench.engine()
    times = take_turns({"bare": bare, "trainer": lambda: bench.step(engine)}, options.steps)
    median = {name: statistics.median(values) for name, values in times.items()}
    console.say(
        f"{options.preset}, batch {options.batch}, {hardware.describe_device()}, {Path(options.deepspeed).name}:"
        f" bare loop {1e3 * median['bare']:.0f} ms, trainer {1e3 * median['trainer']:.0f} ms,"
        f" ratio {median['trainer'] / median['bare']:.3f} (medians of {options.steps})"
    )


def parse() -> Namespace:
    parser = Parser(prog="bench_step.py", description=__doc__.splitlines()[0])
    parser.add_argument("--deepspeed", type=str, required=True, help="DeepSpeed JSON, from ds_configs/")
    parser.add_argument("--preset", type=str, default="tiny", help=", ".join(PRESETS))
    parser.add_argument("--batch", type=int, default=64, help="samples of a step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each side, after two that are not")
    options = parser.parse_args()
    if options.steps < 1:
        raise RunError(f"--steps must be at least 1, not {options.steps}")
    return options


def bare_loop(model: MUG, trainer: TrainerConfig, batch: Batch) -> Callable[[], None]:
    """A step as PyTorch users write it, in bf16 autocast on a GPU."""
    model = model.to(hardware.device())
    optimizer = torch.optim.AdamW(
        parameter_groups(model, trainer.weight_decay), lr=trainer.learning_rate, betas=trainer.betas, fused=True
    )

    def step() -> None:
        with torch.autocast(hardware.device().type, torch.bfloat16, enabled=torch.cuda.is_available()):
            losses, _ = model(hardware.to_device(batch))
        sum(WEIGHTS[term] * loss for term, loss in losses.items()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def take_turns(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, `rounds` times in turn, after two rounds to warm up."""
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
