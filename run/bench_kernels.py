#!/usr/bin/env python3
"""Time the kernels beside plain PyTorch, torch.compile and the libraries that import.

    python run/bench_kernels.py --json kernels.jsonl --png kernels.png
    python run/bench_kernels.py --op attention --device cpu
    python run/bench_kernels.py --op attention --write-table
    python run/bench_kernels.py --op model_step --preset base --batch 32 --steps 3

The first three measure a large copy and a large matrix product, then each kernel's share of what these allow, and end
with status 1 if a kernel of ours computes something else than the reference; --write-table makes the fastest backends
what attention takes on such a GPU from then on. On a GPU the shapes are those of
training at 224 px in bf16, on a CPU small ones in fp32. The last compares training steps of the model with and
without the fused losses, in memory and time. docs/benchmarks.md says what is measured how.
"""

import json
import os
import sys
from pathlib import Path

import torch
from jsonargparse import Namespace
from rich.console import Console as RichConsole

from mug.kernels import attention, attention_table
from mug.model.presets import PRESETS
from mug.run.benchmarks import kernel_report
from mug.run.benchmarks.kernel_ops import OPS, SIZES
from mug.run.benchmarks.kernel_report import Row
from mug.run.benchmarks.kernel_timing import (
    Ceilings,
    Stopwatch,
    Workload,
    exact_results,
    is_right,
    machine_row,
    measure_ceilings,
    peak_memory,
    relative_error,
    results,
    time_passes,
)
from mug.run.benchmarks.model_step import PATHS, WARM_UPS, compare_steps, describe
from mug.run.training.command_line import Parser
from mug.run.training.console import Console, run_command
from mug.run.training.errors import RunError


def main(console: Console) -> None:
    options = parse()
    if options.op == ["model_step"]:
        rows, faults = bench_model_step(options, console)
    else:
        rows, faults = bench_kernels(options, console)
    if options.json:
        Path(options.json).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for fault in faults:
        console.say(f"WRONG: {fault}")
    if faults:
        sys.exit(1)


def parse() -> Namespace:
    parser = Parser(prog="bench_kernels.py", description=__doc__.splitlines()[0])
    names = ", ".join(OPS)
    parser.add_argument("--op", nargs="+", default=list(OPS), help=f"of {names}; or model_step, alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--seconds", type=float, default=0.1, help="about how long one timing takes; 5 runs at least")
    parser.add_argument("--json", type=str, help="write all figures to this file, a JSON object a line")
    parser.add_argument("--png", type=str, help="draw the shares of the roofline into this file")
    parser.add_argument(
        "--write-table", action="store_true", help="attention's: kernels/attention_table.json, on a GPU"
    )
    parser.add_argument("--preset", default="base", help=f"of model_step: {', '.join(PRESETS)}")
    parser.add_argument("--batch", type=int, default=32, help="of model_step: samples of a step")
    parser.add_argument("--steps", type=int, default=3, help="of model_step: timed steps of each side")
    options = parser.parse_args()
    unknown = [op for op in options.op if op not in OPS]
    if unknown and options.op != ["model_step"]:
        raise RunError(f"--op {unknown[0]} is not one of {names}; or model_step, alone")
    if options.device not in SIZES:
        raise RunError(f"--device {options.device} is not one of cuda, cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: PyTorch sees no GPU here; --device cpu compares the references")
    if os.environ.get("TRITON_INTERPRET") == "1" and options.op != ["model_step"]:
        raise RunError("TRITON_INTERPRET=1 is set: unset it, as the speed of Triton's interpreter says nothing")
    if options.write_table and (options.device != "cuda" or "attention" not in options.op):
        raise RunError("--write-table needs --op attention on a GPU: a CPU always takes PyTorch's sdpa")
    for name in ("batch", "steps"):
        if getattr(options, name) < 1:
            raise RunError(f"--{name} must be at least 1, not {getattr(options, name)}")
    return options


def bench_kernels(options: Namespace, console: Console) -> tuple[list[Row], list[str]]:
    """Times every contender of the ops; returns all rows, and what is wrong with our own kernels."""
    device, dtype = torch.device(options.device), SIZES[options.device].dtype
    torch.manual_seed(0)
    stopwatch = Stopwatch(device, options.seconds)
    ceilings = measure_ceilings(stopwatch, dtype)
    machine = machine_row(device, dtype, ceilings)
    console.say(kernel_report.introduction(machine))
    paper = RichConsole(file=console.terminal, width=None if console.terminal.isatty() else 170)
    rows: list[Row] = []
    for op in options.op:
        rows_of_op = [row for workload in OPS[op](device) for row in measure(workload, stopwatch, ceilings)]
        paper.print(kernel_report.table(op, rows_of_op))
        for line in kernel_report.skipped(rows_of_op):
            console.say(line)
        rows += rows_of_op
    if options.png:
        kernel_report.picture(rows, machine, Path(options.png))
    if options.write_table:
        write_attention_table(rows, machine)
    console.say(kernel_report.summary(rows))
    return [machine, *({**row, "device": machine["device"]} for row in rows)], kernel_report.faults(rows)


def measure(workload: Workload, stopwatch: Stopwatch, ceilings: Ceilings) -> list[Row]:
    """Rows of every contender at this shape."""
    exact = exact_results(workload)
    rows: list[Row] = []
    for contender, function in workload.contenders.items():
        row = {"op": workload.op, "shape": workload.shape, "contender": contender, **workload.kind}
        try:
            error = relative_error(results(function, workload.inputs), exact)
            row |= {"error": error, "right": is_right(error, workload)}
            peak = peak_memory(workload, contender)
            timings = time_passes(workload, contender, stopwatch)
        except Exception as reason:  # each library fails in its own way; the others are timed all the same
            line = next(iter(str(reason).splitlines()), "")
            # What a backend does not serve it says by ValueError, a library that is not there by ImportError.
            failed = not isinstance(reason, ValueError | ImportError)
            rows.append({"kind": "skipped", **row, "reason": f"{type(reason).__name__}: {line}", "failed": failed})
            continue
        for name, timing in timings.items():
            work = workload.work.get(name)
            share = work and ceilings.share(work, timing.median)
            figures = kernel_report.time_row(timing, work, share)
            peak_mb = None if peak is None else peak / 1e6
            rows.append({"kind": "time", **row, "pass": name, **figures, "peak_mb": peak_mb})
    return rows


def write_attention_table(rows: list[Row], machine: Row) -> None:
    """What `rows` say is fastest among right backends, into the table from which "auto" chooses."""
    right = [row for row in rows if row["kind"] == "time" and row["op"] == "attention" and row["right"]]
    architecture = attention_table.architecture(torch.device("cuda"))
    timings = [
        {**row, "backend": row["contender"], "architecture": architecture, "milliseconds": row["median_ms"]}
        for row in right
        if row["contender"] in attention.BACKENDS
    ]
    measured = {name: machine[name] for name in ("device", "torch", "triton", "date", "dtype")}
    attention_table.write_table(timings, measured | {"command": "run/bench_kernels.py --write-table"})


def bench_model_step(options: Namespace, console: Console) -> tuple[list[Row], list[str]]:
    """Training steps with the fused losses and with naive ones."""
    console.say(f"{len(PATHS) + 1} processes one after another, {2 * len(PATHS) * (options.steps + WARM_UPS)} steps")
    row = compare_steps(options.preset, options.batch, options.steps, options.device)
    for line in describe(row):
        console.say(line)
    difference = row["largest_loss_difference"]
    return [row], [] if difference <= row["tolerance"] else [f"the losses of the sides differ by {difference:.1e}"]


if __name__ == "__main__":
    run_command(main)
