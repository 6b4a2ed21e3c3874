"""Start the real commands, as users start them."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `commands`, without pytest too

from commands import run_on_ranks, run_script

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ZERO3 = "ds_configs/zero3.json"
DRAWINGS = ["--config", "run/recipes/mug/openmoji_tiny.yaml"]

PYTHON = [sys.executable]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def deepspeed(ranks: int) -> list[str]:
    """The DeepSpeed launcher; more than one rank has to be asked for on a machine without GPUs."""
    several = ["--num_accelerators", str(ranks)] if ranks > 1 else []
    return [str(BIN / "deepspeed"), "--master_port", free_port(), *several]


def torchrun(ranks: int) -> list[str]:
    return [str(BIN / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", free_port()]


def forks(ranks: int) -> list[str]:
    """torchrun's ranks without a launcher and imports of their own: where these are not what is tested."""
    return ["forks", str(ranks), free_port()]


# A model of a few thousand weights on a handful of pairs a step: what matters here is the machinery around it.
TOY = [
    *("--model.width", "32", "--model.depth", "2", "--model.heads", "2"),
    *("--model.pixel_width", "32", "--model.pixel_depth", "1", "--model.pixel_heads", "2"),
    *("--model.text_width", "32", "--model.text_heads", "2"),
    *("--model.text_unimodal_layers", "1", "--model.text_cross_layers", "1"),
    *("--trainer.global_batch", "8", "--trainer.micro_batch", "4", "--trainer.log_every", "1"),
    *("--trainer.warmup_samples", "0", "--trainer.eval_samples", "32", "--data.workers", "0"),
]


def pretrain(
    output: Path | str, *options: str, launcher: list[str] | None = None, config: str = ZERO3
) -> subprocess.CompletedProcess:
    """run/pretrain.py to its end; `launcher` is the command before the script, if it needs one."""
    return run(_command(output, options, launcher or [], config))


def run(command: list[str]) -> subprocess.CompletedProcess:
    """Run a script of the project, or a launcher with one, to its end."""
    if command[0].startswith("run/"):
        return run_script(*command, env=environment())
    if command[0] == "forks":
        return run_on_ranks(int(command[1]), *command[2:], env=environment())
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def _command(output: Path | str, options: Iterable[str], launcher: list[str], config: str) -> list[str]:
    recipe = [] if "--config" in options else DRAWINGS
    return [*launcher, "run/pretrain.py", "--deepspeed", config, "--output", str(output), *recipe, *options]


def kill_when(
    reached: Callable[[], bool], output: Path, *options: str, launcher: list[str] = PYTHON, config: str = ZERO3
) -> None:
    """Start the run, and SIGKILL it with all of its processes as soon as `reached()`."""
    process = subprocess.Popen(
        _command(output, options, launcher, config),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not reached():
        time.sleep(0.002)
    assert process.returncode is None, "the run ended before it could be killed"
    for victim in (*psutil.Process(process.pid).children(recursive=True), process):  # torchrun's ranks lead sessions
        victim.kill()
    process.wait()


def kill_at_a_row(
    output: Path, row: int, *options: str, lives: int = 1, launcher: list[str] = PYTHON, config: str = ZERO3
) -> None:
    """SIGKILL the run in its life number `lives` as soon as its metrics hold `row` lines."""
    metrics = output / "metrics.jsonl"

    def reached() -> bool:
        text = metrics.read_text() if metrics.exists() else ""
        begun = text.count('"event": "start"') + text.count('"event": "resume"')
        return begun >= lives and text.count("\n") >= row

    kill_when(reached, output, *options, launcher=launcher, config=config)


def environment() -> dict[str, str]:
    """The user's, with the virtual environment's programs first."""
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}


def rows(output: Path, kind: str) -> list[dict]:
    """The rows of one kind in a run's metrics."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(output: Path, kind: str = "train") -> list[dict[str, float]]:
    """What training computed, without what depends on the clock."""
    clock = ("images_per_s", "data_wait", "goodput", "memory_gb", "tflops", "mfu")
    return [{name: value for name, value in row.items() if name not in clock} for row in rows(output, kind)]
