#!/usr/bin/env python3
"""Time the kernels against plain PyTorch, torch.compile and the libraries that import.

    python run/bench_kernels.py --json kernels.jsonl --png kernels.png
    python run/bench_kernels.py --op attention --device cpu
    python run/bench_kernels.py --op attention --write-table
    python run/bench_kernels.py --op attention --shapes 'N=50 ' --contenders triton sdpa_cudnn --budget 20
    python run/bench_kernels.py --op model_step --preset base --batch 32 --steps 3

All but the last measure a large copy and a large matrix product, then each kernel's share of what these allow, and end
with status 1 if a kernel of this project disagrees with the reference; --write-table makes attention use the fastest
backends on such a GPU from then on. Rows and table are written as they are measured, what matters most
first, so that a run that is stopped keeps what it has. On a GPU the shapes are those of
training at 224 px in bf16, on a CPU small ones in fp32. The last compares training steps of the model with and
without the fused losses, in memory and time. docs/benchmarks.md explains what is measured how.
"""

import math
import os
import re
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from jsonargparse import Namespace

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
    is_lost,
    is_right,
    machine_row,
    measure_ceilings,
    peak_memory,
    relative_error,
    results,
    time_passes,
)
from mug.run.benchmarks.model_step import compare_steps, describe
from mug.run.benchmarks.record import Record
from mug.run.common.command_line import Parser, check_min
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RunError


def main(console: Console) -> None:
    options = parse()
    bench = bench_model_step if options.op == ["model_step"] else bench_kernels
    faults = bench(options, Record(options.json), console)
    for fault in faults:
        console.info(f"WRONG: {fault}")
    if faults:
        sys.exit(1)


def parse() -> Namespace:
    parser = Parser(prog="bench_kernels.py", description=__doc__.splitlines()[0])
    names = ", ".join(OPS)
    parser.add_argument("--op", nargs="+", default=list(OPS), help=f"of {names}; or model_step, alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--seconds", type=float, default=0.1, help="about how long one timing takes; at least 5 runs")
    parser.add_argument("--shapes", default="", help="only shapes in which this regular expression is found")
    parser.add_argument("--contenders", nargs="+", help="only these, as triton or sdpa_cudnn; all by default")
    parser.add_argument("--budget", type=float | None, default=None, help="begin no shape after so many seconds")
    parser.add_argument("--json", type=str, help="write all results to this file, a JSON object a line, as they come")
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
        raise RunError("TRITON_INTERPRET=1 is set: unset it, as the speed of Triton's interpreter means nothing")
    if options.write_table and (options.device != "cuda" or "attention" not in options.op):
        raise RunError("--write-table needs --op attention on a GPU: a CPU always takes PyTorch's sdpa")
    check_min(options, {"seconds": 0, "budget": 0, "batch": 1, "steps": 1}, "--")
    try:
        re.compile(options.shapes)
    except re.error as error:
        raise RunError(f"--shapes {options.shapes} is not a regular expression: {error}") from None
    return options


def bench_kernels(options: Namespace, record: Record, console: Console) -> list[str]:
    """Time the wanted contenders of the ops; return what is wrong with our own kernels."""
    end = math.inf if options.budget is None else time.monotonic() + options.budget
    device, dtype = torch.device(options.device), SIZES[options.device].dtype
    torch.manual_seed(0)
    stopwatch = Stopwatch(device, options.seconds)
    ceilings = measure_ceilings(stopwatch, dtype)
    machine = machine_row(device, dtype, ceilings)
    record.add(machine)
    console.info(kernel_report.introduction(machine))
    late: list[str] = []
    for op in options.op:
        for workload in OPS[op](device):
            if not re.search(options.shapes, workload.shape):
                continue
            if time.monotonic() > end:
                late.append(f"{op} {workload.shape}")
                continue
            first = len(record.rows)
            for row in measure(workload, stopwatch, ceilings, options.contenders):
                record.add({**row, "device": machine["device"]})
            for line in kernel_report.lines(record.rows[first:]):
                console.info(line)
            if options.write_table and op == "attention":
                write_attention_table(record.rows, machine)
    if record.rows == [machine] and not late:
        raise RunError("--shapes and --contenders leave nothing to time")
    report(options, record.rows, machine, console)
    if late:
        console.info(f"left out after {options.budget:.0f} s: {', '.join(late)}")
    console.info(kernel_report.summary(record.rows))
    return kernel_report.faults(record.rows)


def report(options: Namespace, rows: list[Row], machine: Row, console: Console) -> None:
    """Print a table an op, and draw the picture that --png asks for."""
    for op in options.op:
        rows_of_op = [row for row in rows if row.get("op") == op]
        console.show(kernel_report.table(op, rows_of_op), columns=170)
        for line in kernel_report.skipped(rows_of_op):
            console.info(line)
    if options.png:
        kernel_report.picture(rows, machine, Path(options.png))


def measure(
    workload: Workload, stopwatch: Stopwatch, ceilings: Ceilings, names: Collection[str] | None = None
) -> Iterator[Row]:
    """Yield the rows of every contender at this shape, or of those in `names`.

    Raises:
        RunError: a contender has broken the GPU for this process; its row came first.
    """
    exact = exact_results(workload)
    for contender, function in workload.contenders.items():
        if names is not None and contender not in names:
            continue
        row = {"op": workload.op, "shape": workload.shape, "contender": contender, **workload.kind}
        try:
            error = relative_error(results(function, workload.inputs), exact)
            row |= {"error": error, "right": is_right(error, workload)}
            peak = peak_memory(workload, contender)
            timings = time_passes(workload, contender, stopwatch)
        except Exception as reason:  # each library fails in its own way; the others are timed all the same
            line = next(iter(str(reason).splitlines()), "")
            # A backend raises ValueError for what it does not serve, a missing library ImportError.
            failed = not isinstance(reason, ValueError | ImportError)
            yield {"kind": "skipped", **row, "reason": f"{type(reason).__name__}: {line}", "failed": failed}
            if is_lost(stopwatch.device):
                name = f"{workload.op} {contender} {workload.shape}"
                raise RunError(f"{name} has broken the GPU for this process, the rest was not timed: {line}") from None
            continue
        for name, timing in timings.items():
            work = workload.work.get(name)
            share = work and ceilings.share(work, timing.median)
            metrics = kernel_report.time_row(timing, work, share)
            peak_mb = None if peak is None else peak / 1e6
            yield {"kind": "time", **row, "pass": name, **metrics, "peak_mb": peak_mb}


def write_attention_table(rows: list[Row], machine: Row) -> None:
    """Write the fastest correct backends by `rows` into the table from which "auto" chooses."""
    right = [row for row in rows if row["kind"] == "time" and row["op"] == "attention" and row["right"]]
    architecture = attention_table.architecture(torch.device("cuda"))
    timings = [
        {**row, "backend": row["contender"], "architecture": architecture, "milliseconds": row["median_ms"]}
        for row in right
        if row["contender"] in attention.BACKENDS
    ]
    measured = {name: machine[name] for name in ("device", "torch", "triton", "date", "dtype")}
    attention_table.write_table(timings, measured | {"command": "run/bench_kernels.py --write-table"})


def bench_model_step(options: Namespace, record: Record, console: Console) -> list[str]:
    """Time training steps with the fused losses and with naive ones; return what is wrong."""
    row = compare_steps(options.preset, options.batch, options.steps, options.device)
    record.add(row)
    for line in describe(row):
        console.info(line)
    difference = row["largest_loss_difference"]
    return [] if difference <= row["tolerance"] else [f"the losses of the sides differ by {difference:.1e}"]


if __name__ == "__main__":
    run_command(main)
