"""Start the real commands, as users start them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ZERO3 = "ds_configs/zero3.json"

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
    output: Path | str, *options: str, launcher: list[str] = PYTHON, config: str = ZERO3
) -> subprocess.CompletedProcess:
    """run/pretrain.py to its end; `launcher` is the command before the script."""
    command = [*launcher, "run/pretrain.py", "--deepspeed", config, "--output", str(output), *options]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def environment() -> dict[str, str]:
    """The user's, with the virtual environment's programs first."""
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}


def rows(output: Path, kind: str) -> list[dict]:
    """The rows of one kind in a run's metrics."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(output: Path, kind: str = "train") -> list[dict[str, float]]:
    """What training computed, without what depends on the clock."""
    clock = ("images_per_s", "data_wait", "goodput", "memory_gb", "mfu")
    return [{name: value for name, value in row.items() if name not in clock} for row in rows(output, kind)]
