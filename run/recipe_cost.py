#!/usr/bin/env python3
"""FLOP of a sample, by kind of batch and loss, and what a recipe's run costs on a named GPU.

    python run/recipe_cost.py run/recipes/unix2/base.yaml --gpu H100 --words 18 --vocabulary 250027
    python run/recipe_cost.py run/recipes/clip/cc3m_base.yaml --samples 1.13e8 --words 14

Forward and backward, of matrix products alone, and of a text its words, BOS, EOS and language: see mug.model.flops.
Nothing is read but the recipe: of the vocabulary its size counts, which --vocabulary gives.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jsonargparse import Namespace

from mug.model.objectives.objective import Context, find_objective
from mug.model.presets import Vocabulary
from mug.run.benchmarks.synthetic import kind_batch
from mug.run.cluster.hardware import PEAK_FLOPS
from mug.run.common.command_line import Parser, check_min
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RunError
from mug.run.pretrain import DEFAULT_RECIPE
from mug.run.training.recipe import Recipe, check_fractions, parse_command

BATCH = 64  # synthetic samples over which a mean is taken: what is masked, cut or replaced differs
UTILIZATION = 0.4  # of the peak: 50% of what an H100's largest matrix products reach


def main(console: Console) -> None:
    options = parse()
    recipe = recipe_of(options.recipe)
    shares = {name: stream.weight for name, stream in recipe.streams.items()}
    samples, mean = options.samples or samples_of(recipe), 0.0
    for name, stream in recipe.streams.items():
        by_loss = gflop_by_loss(recipe, stream.kind, options.words, options.vocabulary)
        mean += by_loss["all"] * shares[name] / sum(shares.values())
        losses = ", ".join(f"{loss} {gflop:.1f}" for loss, gflop in by_loss.items() if loss != "all")
        console.info(
            f"{name or recipe.objective} ({stream.kind}): {by_loss['all']:.1f} GFLOP a sample; alone: {losses}"
        )
    total = mean * 1e9 * samples
    hours = total / (PEAK_FLOPS[options.gpu] * options.utilization) / 3600
    console.info(
        f"mean {mean:.1f} GFLOP, {samples:.3g} samples: {total:.2g} FLOP, {hours:.1f} hours of an {options.gpu} at"
        f" {options.utilization:.0%} of {PEAK_FLOPS[options.gpu] / 1e12:.0f} TFLOP/s"
    )


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    """Parse the command line.

    Raises:
        RunError: an unknown flag or GPU, or a number out of range.
    """
    parser = Parser(prog="recipe_cost.py", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=str, help="a YAML file of run/recipes/ that pretrain.py takes")
    parser.add_argument("--gpu", type=str, default="H100", help=", ".join(PEAK_FLOPS))
    parser.add_argument("--utilization", type=float, default=UTILIZATION, help="share of its peak, dense bf16")
    parser.add_argument("--words", type=int, default=17, help="tokens of a text, besides BOS, EOS and language")
    parser.add_argument("--vocabulary", type=int, default=30_522, help="tokens of the tokenizer")
    parser.add_argument("--samples", type=float | None, default=None, help="of the run, where max_steps is not set")
    options = parser.parse_args(arguments)
    if options.gpu not in PEAK_FLOPS:
        raise RunError(f"--gpu {options.gpu} is not one of {', '.join(PEAK_FLOPS)}")
    check_min(options, {"words": 1, "vocabulary": 100, "samples": 1}, "--")
    check_fractions(options, "utilization")
    return options


def recipe_of(file: str) -> Recipe:
    command = parse_command("recipe_cost.py", "", DEFAULT_RECIPE, ["--deepspeed", "-", "--config", file])
    return command.recipe


def samples_of(recipe: Recipe) -> int:
    if recipe.trainer.max_steps is None:
        raise RunError("the recipe counts epochs of data that are not read here: give --samples")
    return recipe.trainer.max_steps * recipe.trainer.global_batch


def gflop_by_loss(recipe: Recipe, kind: str, words: int, vocabulary: int) -> dict[str, float]:
    """Returns loss → GFLOP of a sample of this kind with this loss alone, and `all` with all that are weighed."""
    of_all, losses = gflop(recipe, kind, words, vocabulary, tuple(recipe.active_losses))
    return {"all": of_all} | {name: gflop(recipe, kind, words, vocabulary, (name,))[0] for name in losses}


def gflop(
    recipe: Recipe, kind: str, words: int, vocabulary: int, losses: tuple[str, ...]
) -> tuple[float, tuple[str, ...]]:
    """Returns the GFLOP of a sample of this kind, and those of the losses that it has."""
    found = find_objective(recipe.objective)
    tokens = Vocabulary(vocabulary, pad=0, bos=1, eos=2, mask=3)
    if len(found.kinds) > 1:  # it learns from texts in several languages
        tokens = replace(tokens, languages=("en",), language_ids=(vocabulary - 1,))
    with torch.device("meta"):
        objective = found(recipe.model, Context(recipe.seed, tokens, losses=losses))
    batch = objective.prepare(kind_batch(objective, kind, BATCH, words))
    return objective.flops(batch) / BATCH / 1e9, tuple(objective.counts(batch))


if __name__ == "__main__":
    run_command(main)
