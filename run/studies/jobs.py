"""Runs commands side by side; each that is finished is recorded, and not run again."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mug.run.common.console import Console
from mug.run.common.errors import RestartRequested, RunError
from mug.run.common.output import write_whole

RUN = Path(__file__).parents[1]
_running: set[subprocess.Popen] = set()


@dataclass(frozen=True)
class Job:
    """One command of run/.

    produces: file or folder, removed before the command runs again.
    resumes: the command itself resumes in what it has produced.
    """

    name: str
    command: list[str]
    produces: Path
    resumes: bool = False

    def file(self, folder: Path, kind: str, end: str) -> Path:
        return file_of(self.name, folder, kind, end)


def file_of(job: str, folder: Path, kind: str, end: str) -> Path:
    """Returns a file of the job of this name."""
    return folder / kind / f"{job.replace('/', '_')}.{end}"


def flags(values: dict[str, Any]) -> list[str]:
    """Returns the options that set values by their names; a list or text in the way that the parser reads it."""
    return [text for name, value in values.items() for text in (f"--{name}", _text(value))]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def parallelism() -> int:
    """Returns how many jobs to run at a time."""
    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def run_side_by_side(chains: Iterable[list[Job]], folder: Path, console: Console) -> None:
    """Run chains of jobs, as many at once as there are cores; on a GPU, one after the other.

    Raises:
        RunError: a job failed; running chains end after their current job.
        KeyboardInterrupt, RestartRequested: it was interrupted; running jobs are asked to save and end.
    """
    stop, made = threading.Event(), when_made(folder)

    def run_chain(chain: list[Job]) -> None:
        try:
            for job in chain:
                if not stop.is_set():
                    run_job(job, folder, console, made)
        except BaseException:  # a full disk, too
            stop.set()
            raise

    with ThreadPoolExecutor(parallelism()) as pool:
        try:
            for done in as_completed([pool.submit(run_chain, chain) for chain in chains]):
                done.result()
        except BaseException as reason:
            stop.set()
            if isinstance(reason, KeyboardInterrupt | RestartRequested):
                for process in list(_running):
                    process.terminate()
            raise


def run_job(job: Job, folder: Path, console: Console, made: dict[Path, float]) -> None:
    """Run a job to its end, unless its record says that this command has finished, and with what is there now.

    made: of `when_made`; what this job produces is added.

    Raises:
        RunError: it failed, and its log is named; or what it produces is there, but is not of this study.
    """
    record, log = job.file(folder, "done", "json"), job.file(folder, "logs", "log")
    before = read_record(record)
    if not before and job.produces.exists():
        raise RunError(f"{job.produces} is there, but is not this study's: move it, or choose another --out")
    same = before.get("command") == job.command and not _remade(job, before["began"], made)
    if same and "ended" in before:
        return
    if not (same and job.resumes):
        remove(job.produces)
    for path in (record, log, job.produces):
        path.parent.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"command": job.command, "produces": str(job.produces), "began": time.time()}
    write_whole(record, json.dumps(facts))
    status, cpu_seconds = call([sys.executable, str(RUN / job.command[0]), *job.command[1:]], log)
    if status:
        last = (log.read_text(encoding="utf-8").splitlines() or ["no output"])[-1]
        raise RunError(f"{job.name} ended with status {status}: {last} (full log: {log})")
    facts |= {"ended": time.time(), "cpu_seconds": cpu_seconds}
    write_whole(record, json.dumps(facts))
    made[job.produces] = facts["ended"]
    console.info(f"{job.name}, {facts['ended'] - facts['began']:.0f} s")


def _remade(job: Job, began: float, made: dict[Path, float]) -> bool:
    """Whether something that the command names, or that lies in a folder of it, was made again since it began."""
    words = [Path(word) for argument in job.command for word in argument.split()]
    named = {path for word in words for path in (word, *word.parents)} - {job.produces}
    return any(made.get(path, 0.0) > began for path in named)


def when_made(folder: Path) -> dict[Path, float]:
    """Returns what the jobs that have finished produced, and when."""
    return {Path(record["produces"]): record["ended"] for record in finished(folder) if "produces" in record}


def read_record(path: Path) -> dict[str, Any]:
    """Returns the record of a job; {} where there is none, or a damaged one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def call(command: list[str], log: Path) -> tuple[int, float]:
    """Run a command, its output into `log`; returns its exit status and CPU seconds, of its own children too."""
    threads = {"OMP_NUM_THREADS": "1"} if parallelism() > 1 else {}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | threads)
        _running.add(process)
        _, status, usage = os.wait4(process.pid, 0)
        _running.remove(process)
    process.returncode = os.waitstatus_to_exitcode(status)  # it is waited for: Popen need not
    return process.returncode, usage.ru_utime + usage.ru_stime


def finished(folder: Path) -> list[dict[str, Any]]:
    """Returns the records of all jobs that have finished."""
    found = [read_record(path) for path in sorted((folder / "done").glob("*.json"))]
    return [record for record in found if "ended" in record]


def time_taken(jobs: list[dict[str, Any]]) -> float:
    """Returns the seconds in which at least one job ran: pauses do not count, and parallel jobs count once."""
    seconds, until = 0.0, 0.0
    for job in sorted(jobs, key=lambda job: job["began"]):
        seconds += max(0.0, job["ended"] - max(job["began"], until))
        until = max(until, job["ended"])
    return seconds


def remove(path: Path) -> None:
    """Remove what an interrupted job has left: a file, or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
