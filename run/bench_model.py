#!/usr/bin/env python3
"""Images per second and MFU of training on one device, next to the matrix product measured in the same run.

    python run/bench_model.py                                         # base, large, huge on a GPU, in bf16
    python run/bench_model.py --preset base --batch 512 --compile
    python run/bench_model.py --preset huge --activation_checkpointing elementwise
    python run/bench_model.py --device cpu                            # tiny, in fp32

Needs no DeepSpeed and no data. Each line ends with what takes the step's time. MFU counts the tokens that captions
have (half of the text length here), not their padding, of which the model computes nothing.
"""

from typing import Literal

import torch
from jsonargparse import Namespace

from mug.model.activation_checkpointing import POLICIES
from mug.model.presets import PRESETS
from mug.run.benchmarks import kernel_report
from mug.run.benchmarks.kernel_timing import Stopwatch, machine_row, measure_ceilings
from mug.run.benchmarks.record import Record
from mug.run.benchmarks.throughput import Blocks, describe, measure_preset
from mug.run.common.command_line import Parser, check_min
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RunError

# Samples of a step, by preset, that suit GPUs with at least so much memory (bytes): H200 and larger, H100 and the rest.
BATCHES = {
    130e9: {"tiny": 1024, "small": 1024, "base": 1024, "large": 512, "huge": 256},
    0.0: {"tiny": 512, "small": 512, "base": 512, "large": 256, "huge": 128},
}
ON_CPU = {"tiny": 64, "small": 16, "base": 8, "large": 4, "huge": 2}  # seconds a step on two cores


def main(console: Console) -> None:
    options = parse()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ceilings = measure_ceilings(Stopwatch(device, 0.1), dtype)
    record = Record(options.json)
    record.add(machine_row(device, dtype, ceilings))
    console.info(kernel_report.introduction(record.rows[0]))
    batches = dict.fromkeys(options.preset, options.batch) if options.batch else suiting(device)
    if not options.batch:
        console.info(f"batches: {', '.join(f'{preset} {batches[preset]}' for preset in options.preset)}")
    blocks = Blocks(options.compile, options.activation_checkpointing)
    for preset in options.preset:
        row, batch = None, batches[preset]
        while row is None:
            try:
                row = measure_preset(preset, batch, options.steps, device, blocks, ceilings)
            except torch.OutOfMemoryError as error:
                if options.batch or batch == 1:
                    raise RunError(f"--batch {batch} of {preset} does not fit this GPU; lower it") from error
                console.info(f"{preset}, batch {batch}: does not fit this GPU; trying {batch // 2}")
                batch //= 2
        console.info(describe(row))
        record.add(row)


def suiting(device: torch.device) -> dict[str, int]:
    """Returns preset → samples of a step that suit the device."""
    return ON_CPU if device.type == "cpu" else fitting(torch.cuda.get_device_properties(device).total_memory)


def fitting(memory: float) -> dict[str, int]:
    """Returns preset → samples of a step for a GPU of so many bytes."""
    return BATCHES[max(minimum for minimum in BATCHES if memory >= minimum)]


def parse() -> Namespace:
    parser = Parser(prog="bench_model.py", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", help=f"of {', '.join(PRESETS)}; base, large, huge, on a CPU tiny")
    parser.add_argument("--batch", type=int, help="samples of a step; by default what suits the device's memory")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--compile", action="store_true", help="each block under torch.compile")
    parser.add_argument(
        "--activation_checkpointing",
        type=Literal[POLICIES],
        default="none",
        help="what backward computes again to save memory",
    )
    parser.add_argument("--json", type=str, help="write all results to this file, a JSON object a line")
    options = parser.parse_args()
    options.preset = options.preset or (["tiny"] if options.device == "cpu" else ["base", "large", "huge"])
    unknown = [preset for preset in options.preset if preset not in PRESETS]
    if unknown:
        raise RunError(f"--preset {unknown[0]} is not one of {', '.join(PRESETS)}")
    if options.device not in ("cuda", "cpu"):
        raise RunError(f"--device {options.device} is not one of cuda, cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: PyTorch sees no GPU here; --device cpu measures the CPU")
    check_min(options, {"batch": 1, "steps": 1}, "--")
    return options


if __name__ == "__main__":
    run_command(main)
