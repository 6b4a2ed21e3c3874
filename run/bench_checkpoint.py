#!/usr/bin/env python3
"""Time how long training waits for a checkpoint, saved synchronously and asynchronously.

    python run/bench_checkpoint.py --deepspeed ds_configs/zero3.json --preset large --output /data/scratch

One rank. Both kinds of save take turns, in one process and on one disk, after one that is not timed; between them the
model trains. Prints the medians of the stalls and their ratio.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from mug.model.presets import PRESETS
from mug.run.benchmarks.one_rank import OneRank
from mug.run.cluster import hardware
from mug.run.common.command_line import Parser, check_min
from mug.run.common.console import Console, run_command
from mug.run.state.config import CheckpointConfig
from mug.run.state.saver import Saver
from mug.run.state.sharded_state import KINDS


def main(console: Console) -> None:
    options = parse()
    bench = OneRank.start(options)
    engine = bench.engine()
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    folder = Path(tempfile.mkdtemp(dir=options.output))
    try:
        stalls = measure(engine, bench.step(engine), folder, options.rounds)
    finally:
        shutil.rmtree(folder)
    synchronous, asynchronous = (statistics.median(values) for values in stalls.values())
    console.info(
        f"{options.preset}, {len(KINDS) * 4e-9 * parameters:.2f} GB, {hardware.describe_device()}: training waits"
        f" {synchronous:.2f} s for a synchronous save, {asynchronous:.2f} s for an asynchronous one,"
        f" ratio {asynchronous / synchronous:.3f} (medians of {options.rounds})"
    )


def parse() -> Namespace:
    parser = Parser(prog="bench_checkpoint.py", description=__doc__.splitlines()[0])
    parser.add_argument("--deepspeed", type=str, required=True, help="DeepSpeed JSON, from ds_configs/")
    parser.add_argument("--preset", type=str, default="large", help=", ".join(PRESETS))
    parser.add_argument("--batch", type=int, default=1, help="samples of a step")
    parser.add_argument("--rounds", type=int, default=3, help="timed saves of each kind")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder to write in, and to clean")
    options = parser.parse_args()
    check_min(options, {"batch": 1, "rounds": 1}, "--")
    return options


def measure(engine: Any, train: Any, folder: Path, rounds: int) -> dict[bool, list[float]]:
    """Returns the seconds that training waits for each save, by whether it is asynchronous."""
    stalls: dict[bool, list[float]] = {False: [], True: []}
    savers = {
        kind: Saver(engine, folder, CheckpointConfig(keep=1, asynchronous=kind), lambda *_: None) for kind in stalls
    }
    train()
    for turn in range(1 + rounds):
        for kind, saver in savers.items():
            begin = time.perf_counter()
            saver.save(2 * turn + kind, {}, {})
            seconds = time.perf_counter() - begin
            while saver.pending is not None:
                train()
                begin = time.perf_counter()
                saver.poll()  # commits, once all is written
                seconds += time.perf_counter() - begin
            if turn:
                stalls[kind].append(seconds)
    return stalls


if __name__ == "__main__":
    run_command(main)
