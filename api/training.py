"""Training from Python: the command of run/pretrain.py, as a shell would start it."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mug.api.images import ImageLike
from mug.api.models import Model, load
from mug.api.pairs import write_pairs
from mug.run.common.errors import RunError
from mug.run.training.recipe import RECIPES

WITHOUT_PAIRS, FOR_PAIRS = "mug/compositions_tiny.yaml", "mug/openmoji_tiny.yaml"  # the default recipes


def train(
    output: str | Path,
    pairs: Iterable[tuple[ImageLike, str]] | None = None,
    recipe: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    held_out: float = 0.1,
) -> Model:
    """Train by run/pretrain.py in processes of its own, one per GPU, and return the model; its lines are printed.

    The same call again resumes a run that was interrupted, and returns the model of one that is finished.

    Args:
        output: folder of the run. The pairs lie in its folder `pairs`, as shards and a tokenizer of their captions.
        pairs: (image, caption), images as `Model` takes them; without them, the data that the recipe names.
        recipe: a YAML file, or the name of one in run/recipes/; by default FOR_PAIRS or WITHOUT_PAIRS.
            Most others are for millions of pairs.
        options: dotted names of the recipe's keys, and others of the command line, to values: {"trainer.max_steps":
            200, "deepspeed": "ds_configs/zero3.json"}.
        held_out: share of the pairs to hold out and evaluate on, by their places in the list.

    Raises:
        DataError: an image of the pairs cannot be used, and is named; or their captions hold no word.
        RunError: training ended early; the message is its own last line.
    """
    recipe = recipe or (WITHOUT_PAIRS if pairs is None else FOR_PAIRS)
    named = RECIPES / recipe if not Path(recipe).is_file() and (RECIPES / recipe).is_file() else recipe
    chosen: dict[str, Any] = {"config": str(named), "output": str(output), "deepspeed": "ds_configs/zero1.json"}
    if pairs is not None:
        chosen |= write_pairs(pairs, Path(output).absolute() / "pairs", held_out)
    chosen |= options or {}
    _run([f"--{name}={_text(value)}" for name, value in chosen.items()])
    return load(chosen["output"])


def _text(value: Any) -> str:
    """Returns a value as the command line reads it, in YAML."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def _run(arguments: list[str]) -> None:
    """Run run/pretrain.py with these arguments, and print its lines as they come.

    Raises:
        RunError: it did not end well.
    """
    command, ranks = [sys.executable, "-m"], torch.cuda.device_count()
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command += ["mug.run.pretrain", *arguments]
    last = "it printed nothing"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="")
                last = line.strip() or last
        except BaseException:  # the keyboard, for example
            process.terminate()  # it saves, and ends
            raise
    if process.returncode:
        raise RunError(f"training ended with status {process.returncode}: {last.removeprefix('error: ')}")
