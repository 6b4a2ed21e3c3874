"""What tests of evaluations share: contexts, and checkpoints of untrained models."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from mug.data.builders.tokenizer_training import train_tokenizer
from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Context
from mug.model.presets import Vocabulary
from mug.run.evaluators.evaluator import EvalContext, Subject
from mug.run.state.checkpoint import commit, open_partial
from mug.run.state.restore import describe_model
from mug.run.state.sharded_state import WEIGHT, ParamSlice, write_pieces
from mug.run.training.recipe import RECIPES, parse_command, recorded


def quiet_console(lines: list[str] | None = None) -> SimpleNamespace:
    """A console that keeps its lines in a list."""
    lines = [] if lines is None else lines
    return SimpleNamespace(info=lines.append, warn=lines.append)


def eval_context(output: Path, **options: object) -> EvalContext:
    """A context without held-out samples, unless the options give some."""
    defaults = {
        "open_held_out": dict,
        "pairs": None,
        "tokenizer": None,
        "loss_weights": {},
        "micro_batch": 4,
        "group": 4,
        "max_samples": 100,
        "workers": 0,
        "cache": str(output / "cache"),
        "output": output,
        "console": quiet_console(),
    }
    return EvalContext(**defaults | options)


def subject_of(model: torch.nn.Module, step: int = 3) -> Subject:
    """A whole model to evaluate."""
    return Subject(model, model, lambda: model, step)


SIZES = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "text_length": 8}
SIZES |= {"pixel_width": 16, "pixel_depth": 1, "pixel_heads": 2, "text_width": 16, "text_heads": 2}
SIZES |= {"text_unimodal_layers": 1, "text_cross_layers": 1, "tied_head": False}


def make_checkpoint(run: Path, *options: str, change: Callable[[MUG], None] = lambda model: None) -> MUG:
    """A checkpoint of an untrained MUG with sharp opinions, as a run with these options writes it; its model."""
    sizes = [text for name, value in SIZES.items() for text in (f"--model.{name}", str(value).lower())]
    batch = ["--trainer.global_batch", "4", "--trainer.micro_batch", "4", "--data.workers", "0"]
    arguments = ["--deepspeed", "x.json", "--output", str(run), *sizes, *batch, *options]
    recipe = parse_command("pretrain.py", "", RECIPES / "mug" / "openmoji_tiny.yaml", arguments).recipe
    tokenizer = train_tokenizer(["red green blue square of one colour"] * 3, 512)
    ids = {name: tokenizer.token_to_id(f"[{name.upper()}]") for name in ("pad", "bos", "eos", "mask")}
    vocabulary = Vocabulary(tokenizer.get_vocab_size(), **ids)
    torch.manual_seed(0)
    model = MUG(recipe.model, Context(recipe.seed, vocabulary, losses=tuple(recipe.active_losses)))
    with torch.no_grad():
        if "caption" in model.active:
            model.text_decoder.head.weight.mul_(40)
        change(model)
    file = f"{WEIGHT}-00000-of-00001.safetensors"
    pieces = {ParamSlice(name, 0): p.detach().flatten() for name, p in model.named_parameters()}
    checksum, _ = write_pieces(open_partial(run, 3) / file, pieces)
    state = {"model": describe_model(model), "recipe": recorded(recipe)}
    commit(run, 3, {file: checksum}, state, {"tokenizer.json": tokenizer.to_str()}, keep=1)
    return model.eval()


def mug_config(**options: object) -> MUGConfig:
    """A small model."""
    return dataclasses.replace(MUGConfig(), **SIZES | options)
