#!/usr/bin/env python3
"""Check, on every rank, what a pre-training run will need: one table, one verdict.

    deepspeed --hostfile hosts run/preflight.py --deepspeed ds_configs/zero3.json \\
        --config run/recipes/mug/cc3m_base.yaml

takes the launcher and the options of the run itself: replace `pretrain` by `preflight` in its command. Nothing is
trained, and nothing but the index of the shards stays on the disk. Status 0: ready; 1: a check failed; 2: the command
itself is wrong.
"""

import dataclasses
import json
import os
import socket
import statistics
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.table import Table
from rich.text import Text
from torch.distributed import DistError, Store

from mug.run.cluster import hardware
from mug.run.cluster.rendezvous import rendezvous, rendezvous_timeout
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RunError
from mug.run.pretrain import DEFAULT_RECIPE
from mug.run.training.deepspeed_config import check_batch, load_deepspeed_config
from mug.run.training.engine import recipe_values
from mug.run.training.node_checks import CheckResult, check_node, existing_folder
from mug.run.training.recipe import parse_command

# Checks whose values must agree on all ranks.
SAME = ("versions", "code", "recipe", "index")
CLOCK_LIMIT = 1.0  # seconds; NTP keeps hosts within milliseconds
COLLECTIVE_TIMEOUT = timedelta(minutes=2)


def main(console: Console) -> None:
    # --- The command, as pretrain.py reads it ---
    command = parse_command("preflight.py", __doc__.splitlines()[0], DEFAULT_RECIPE)
    rank, world = hardware.rank_and_world()
    command = command.on_ranks(world)
    trainer = command.recipe.trainer
    hardware.limit_threads()
    steps = check_batch(trainer.global_batch, trainer.micro_batch, world)
    ds_config = load_deepspeed_config(command.deepspeed, recipe_values(trainer, command.recipe.model.width, world))

    # --- Each rank alone: the store needs no more of the network than the way to rank 0 ---
    store = rendezvous(rank, world)
    hardware.use_device()
    reports = exchange(store, rank, world, check_node(command, ds_config, rank, world))
    batch = f"{trainer.global_batch} = {trainer.micro_batch} x {steps} accumulation x {world} rank(s)"
    findings = [CheckResult("batch", batch), *merge(reports)]

    # --- Ranks together: only over a network that every one of them can use ---
    if not any(finding.problem for finding in findings if finding.check == "network"):
        hardware.start_process_group(store, COLLECTIVE_TIMEOUT)
        findings += [clock(reports), shared_folder(command.output, reports), bandwidth()]
        dist.barrier()
        dist.destroy_process_group()

    # --- One table, one verdict ---
    failed = [finding.check for finding in findings if finding.problem]
    show(findings, console)
    hosts = len({report.host for report in reports})
    console.info(f"NOT ready: {', '.join(failed)}" if failed else f"ready: {world} rank(s) on {hosts} host(s)")
    if failed:
        raise SystemExit(1)


# --- Each rank alone --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of one rank."""

    name: str  # its number and host, for messages
    host: str
    findings: dict[str, CheckResult]


def exchange(store: Store, rank: int, world: int, mine: list[CheckResult]) -> list[Report]:
    """Returns the reports of all ranks, on all ranks.

    Raises:
        RunError: a rank did not report in time.
    """
    host = socket.gethostname()
    store.set(f"report {rank}", json.dumps([host, [dataclasses.astuple(finding) for finding in mine]]))
    try:
        store.wait([f"report {other}" for other in range(world)], rendezvous_timeout())
    except DistError:
        silent = [str(other) for other in range(world) if not store.check([f"report {other}"])]
        raise RunError(f"rank(s) {', '.join(silent)} started but did not report in time") from None
    reports = []
    for other in range(world):
        host, findings = json.loads(store.get(f"report {other}"))
        by_check = {check: CheckResult(check, value, problem) for check, value, problem in findings}
        reports.append(Report(f"rank {other} on {host}", host, by_check))
    return reports


def merge(reports: list[Report]) -> list[CheckResult]:
    """Returns one result per check: rank 0's value, or each one where they differ; and whose is wrong."""
    checks = dict.fromkeys(check for report in reports for check in report.findings)
    return [_merged(check, {r.name: r.findings[check] for r in reports if check in r.findings}) for check in checks]


def _merged(check: str, findings: dict[str, CheckResult]) -> CheckResult:
    (first, reference), *others = ((name, finding.value) for name, finding in findings.items())
    problems = [f"{name}: {finding.problem}" for name, finding in findings.items() if finding.problem]
    if check in SAME:
        problems += [f"{name} has {value}, {first} has {reference}" for name, value in others if value != reference]
    by_value: dict[str, list[str]] = {}
    for name, finding in findings.items():
        by_value.setdefault(finding.value, []).append(name)
    values = [f"{_names(names)}: {value}" for value, names in by_value.items()] if len(by_value) > 1 else [reference]
    return CheckResult(check, "\n".join(values), "\n".join(problems) or None)


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


# --- Ranks together ---------------------------------------------------------------------------------------


def clock(reports: list[Report]) -> CheckResult:
    """Measure each rank's clock offset from rank 0's: at half the round trip, as NTP does."""
    offsets = [clock_offset(other) for other in range(1, dist.get_world_size())]
    worst = max(map(abs, offsets), default=0.0)
    off = [
        f"{report.name}: {offset:+.1f} s from rank 0's clock; is NTP running?"
        for report, offset in zip(reports[1:], offsets, strict=True)
        if abs(offset) > CLOCK_LIMIT
    ]
    return CheckResult("clock", f"within {worst * 1000:.0f} ms of rank 0's", "\n".join(off) or None)


def clock_offset(other: int) -> float:
    """Returns the seconds that rank `other`'s clock is ahead of rank 0's, on all ranks: a collective call."""
    answer = torch.zeros(1, dtype=torch.float64, device=hardware.device())
    tries = []
    for _ in range(6):  # the first one connects the two; the fastest is the most exact
        if dist.get_rank() == 0:
            sent = time.time()
            dist.send(answer, dst=other)
            dist.recv(answer, src=other)
            received = time.time()
            tries.append((received - sent, answer.item() - (sent + received) / 2))
        elif dist.get_rank() == other:
            dist.recv(answer, src=0)
            answer.fill_(time.time())
            dist.send(answer, dst=0)
    answer.fill_(min(tries)[1] if tries else 0)
    dist.broadcast(answer, src=0)
    return answer.item()


def shared_folder(output: Path, reports: list[Report]) -> CheckResult:
    """Check that all ranks see what rank 0 writes where the run's folder will be: checkpoints rely on it."""
    folder = existing_folder(output)
    probe = [str(folder / f".preflight-{socket.gethostname()}-{os.getpid()}")]
    dist.broadcast_object_list(probe, src=0)
    path = Path(probe[0])
    try:
        if dist.get_rank() == 0:
            path.touch()
        dist.barrier()
        seen = hardware.gather([_appears(path)])
    finally:
        if dist.get_rank() == 0:
            path.unlink(missing_ok=True)
    blind = [report.name for report, sees in zip(reports, seen, strict=True) if not sees]
    problem = f"{', '.join(blind)}: cannot see rank 0's files in {path.parent}; choose an --output that all share"
    return CheckResult("shared folder", str(path.parent), problem if blind else None)


def _appears(path: Path) -> bool:
    """Wait for a file; a network file system may take seconds to show it."""
    deadline = time.monotonic() + 10
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    return path.exists()


def bandwidth() -> CheckResult:
    """Measure an all-reduce of a large and of a tiny tensor; per-link bandwidth as in NCCL's tests ("busbw")."""
    world = dist.get_world_size()
    if world == 1:
        return CheckResult("bandwidth", "one rank")
    numel = 2**26 if torch.cuda.is_available() else 2**22
    seconds, latency = (_median_seconds(torch.ones(n, device=hardware.device())) for n in (numel, 1))
    rate = 4 * numel / seconds * 2 * (world - 1) / world
    return CheckResult("bandwidth", f"all-reduce {rate / 1e9:.2f} GB/s a link, {latency * 1e6:.0f} µs min")


def _median_seconds(tensor: torch.Tensor) -> float:
    """Returns the median seconds of an all-reduce."""
    taken = []
    for _ in range(6):
        dist.barrier()
        hardware.wait_for_device()
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        hardware.wait_for_device()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])  # the first one connects


# --- Table ------------------------------------------------------------------------------------------------


def show(findings: list[CheckResult], console: Console) -> None:
    """Print the table."""
    table = Table("check", "found", "verdict")
    for finding in findings:
        verdict = Text(finding.problem, style="red") if finding.problem else Text("ok", style="green")
        table.add_row(finding.check, Text(finding.value), verdict)
    console.show(table, columns=120)


if __name__ == "__main__":
    run_command(main)
