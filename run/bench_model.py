#!/usr/bin/env python3
"""Images per second and MFU of training on one device, beside the matrix product measured in the same run.

    python run/bench_model.py                                         # base, large, huge on a GPU, in bf16
    python run/bench_model.py --preset base --batch 512 --compile
    python run/bench_model.py --preset huge --recompute elementwise   # as trainer.recompute
    python run/bench_model.py --preset tiny --batch 32 --device cpu   # in fp32

Needs no DeepSpeed and no data. Each line ends with what takes the step's time. MFU counts the tokens that captions
have (half of the text length here), not their padding, of which the model computes nothing.
"""

import json
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import Namespace

from mug.model.presets import PRESETS
from mug.model.recompute import POLICIES
from mug.run.benchmarks import kernel_report
from mug.run.benchmarks.kernel_timing import Stopwatch, machine_row, measure_ceilings
from mug.run.benchmarks.throughput import Blocks, describe, measure_preset
from mug.run.training.command_line import Parser
from mug.run.training.console import Console, run_command
from mug.run.training.errors import RunError

BATCH = {"tiny": 512, "small": 512, "base": 512, "large": 256, "huge": 128}  # of an 80 GB GPU


def main(console: Console) -> None:
    options = parse()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ceilings = measure_ceilings(Stopwatch(device, 0.1), dtype)
    rows = [machine_row(device, dtype, ceilings)]
    console.say(kernel_report.introduction(rows[0]))
    blocks = Blocks(options.compile, options.recompute)
    for preset in options.preset:
        batch = options.batch or BATCH[preset]
        try:
            row = measure_preset(preset, batch, options.steps, device, blocks, ceilings)
        except torch.OutOfMemoryError as error:
            raise RunError(f"--batch {batch} of {preset} does not fit this GPU; name a smaller one") from error
        console.say(describe(row))
        rows.append(row)
        if options.json:
            Path(options.json).write_text("".join(json.dumps(row) + "\n" for row in rows))


def parse() -> Namespace:
    parser = Parser(prog="bench_model.py", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", default=["base", "large", "huge"], help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--batch", type=int, help="samples of a step; by default what suits 80 GB")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--compile", action="store_true", help="each block under torch.compile")
    parser.add_argument(
        "--recompute", type=Literal[POLICIES], default="nothing", help="what backward computes again to save memory"
    )
    parser.add_argument("--json", type=str, help="write all figures to this file, a JSON object a line")
    options = parser.parse_args()
    unknown = [preset for preset in options.preset if preset not in PRESETS]
    if unknown:
        raise RunError(f"--preset {unknown[0]} is not one of {', '.join(PRESETS)}")
    if options.device not in ("cuda", "cpu"):
        raise RunError(f"--device {options.device} is not one of cuda, cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: PyTorch sees no GPU here; --device cpu measures the CPU")
    for name in ("batch", "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise RunError(f"--{name} must be at least 1, not {getattr(options, name)}")
    return options


if __name__ == "__main__":
    run_command(main)
