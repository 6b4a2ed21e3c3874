#!/usr/bin/env python3
"""Compare objectives on the same pairs: pre-train each, evaluate the encoders alike, write a table and a page.

    python run/benchmark.py run/studies/quick.yaml                      # planned for 15 minutes on 2 CPU cores
    python run/benchmark.py run/studies/objectives.yaml --seeds 3       # hours; any key of the study can be changed

A study is a YAML: data, encoders, budget, judges, and the comparisons declared beforehand. Every job is one of the
commands in run/, as users start it, with its log under OUT/logs; without a GPU, each core works on one job, on one
thread. Rerun, the study resumes where it stopped: finished jobs are not run twice. The primary metric is the mean over
the judges of k nearest neighbours and the linear probe on frozen features (mean of the patch tokens), minus that of the
untrained encoder; rules and limits are in docs/studies.md.
"""

import os
import platform
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from mug.run.common.command_line import Parser
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RestartRequested, RunError
from mug.run.common.output import check_writable, check_writable_file, lock, write_whole
from mug.run.common.packages import load_package
from mug.run.reporting.markdown_tables import write_section
from mug.run.studies.config import Study, add_study, runnable, study_of
from mug.run.studies.jobs import finished, run_side_by_side, time_taken
from mug.run.studies.plan import Plan

STUDIES = Path(__file__).parent / "studies"
UNSAFE = re.compile(r"[\s,{}\[\]*?]")  # in a path they would be read as patterns of shards


@dataclass(frozen=True)
class Options:
    """The parsed command line."""

    study: Study
    out: Path
    results: Path
    arguments: str


def main(console: Console) -> None:
    options = parse()
    study, missing = runnable(options.study)
    if missing:
        left_out = [name for name in options.study.encoders if name not in study.encoders]
        console.warn(f"no objective {', '.join(missing)}: left out are {'; '.join(left_out)}")
    plan = Plan(study, options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    lock(options.out)
    stop_when_asked()
    for chains in plan.stages():
        run_side_by_side(chains, options.out, console)
    write_results(options, plan, console)


def stop_when_asked() -> None:
    """Let SIGTERM and SIGHUP raise RestartRequested: jobs are other processes, which would go on."""

    def stop(number: int, _: object) -> None:
        raise RestartRequested(f"stopped by {signal.Signals(number).name}; the same command continues")

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has SIGHUP
            signal.signal(number, stop)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Parse the command line.

    Raises:
        RunError: no study, an unknown key, a value out of range, or a folder that cannot be written.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="benchmark.py", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=str, help="a YAML file of run/studies/; its keys can be changed by name")
    parser.add_argument("--out", type=str | None, default=None, help="folder of the study (runs/study-NAME)")
    parser.add_argument("--results", type=str | None, default=None, help="file for the tables (OUT/results.md)")
    add_study(parser)
    named = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if named and not Path(named).is_file():
        raise RunError(f"{named}: no such study; there are {', '.join(map(str, sorted(STUDIES.glob('*.yaml'))))}")
    values = parser.instantiate(parser.parse_args([*([f"--config={named}"] if named else []), *arguments]))
    load_package("scipy", "eval")
    out = Path(values.out or Path("runs") / f"study-{Path(values.study).stem}")
    if UNSAFE.search(str(out)):
        raise RunError(f"--out {out}: choose a path without spaces or any of , {{ }} [ ] * ?")
    check_writable(out, "--out")
    if values.results:
        check_writable_file(Path(values.results), "--results")
    return Options(study_of(values), out, Path(values.results or out / "results.md"), shlex.join(arguments))


def write_results(options: Options, plan: Plan, console: Console) -> None:
    """Write the tables under the study's title, and the page."""
    from mug.run.studies.results import Results

    found, text = Results(plan), introduction(options, plan)
    write_section(options.results, plan.study.title, found.markdown(text))
    page = options.out / "study.html"
    write_whole(page, found.html(text))
    console.info(f"{options.results}: {plan.study.title}; page: {page}")


def introduction(options: Options, plan: Plan) -> str:
    """Returns what was run, on what, when."""
    minutes = time_taken(finished(plan.folder)) / 60
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "timm"))
    study, sizes = plan.study, ", ".join(f"{name} {value}" for name, value in plan.study.model.items())
    cores = f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()})"
    return (
        f"`python run/benchmark.py {options.arguments}`, {date.today()}, {cores}, {versions};"
        f" {minutes:.0f} minutes in all. {study.samples:,} samples in batches of {study.batch}; {sizes}. Encoders of"
        " equal samples answer which objective learns more from the same pairs, those of equal FLOP which learns more"
        " at the same cost. Small drawings: nothing here applies to photographs, large models or long training."
    )


if __name__ == "__main__":
    run_command(main)
