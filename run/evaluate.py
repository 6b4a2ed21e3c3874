#!/usr/bin/env python3
"""Evaluate a checkpoint as training does by its recipe's `evals:`.

    python run/evaluate.py runs/NAME --eval knn --knn.data imagenet --eval linear_probe --linear_probe.data imagenet
    python run/evaluate.py runs/NAME --eval losses --eval pictures
    torchrun --nproc-per-node 8 run/evaluate.py runs/NAME --eval zero_shot --zero_shot.data imagenet/val \
        --zero_shot.names imagenet_names.json --eval retrieval --retrieval.shards 'coco_val/*.tar'

Any number of ranks share the work. The metrics go into the run's results.jsonl (or the file of --json), written
captions into its captions.jsonl and pictures into its samples/, where run/report.py finds them. An evaluation is a file
of run/evaluators/; its options are named after it. Features of frozen encoders are kept under the cache folder, by
weights and images.
"""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mug.data.config import DataConfig
from mug.run.cluster import hardware
from mug.run.cluster.rendezvous import rendezvous
from mug.run.common.command_line import Parser, check_min
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RunError
from mug.run.common.output import check_writable, check_writable_file
from mug.run.evaluators.evaluator import (
    EvalConfig,
    EvalContext,
    Result,
    Subject,
    check_config,
    evaluator_names,
    find_evaluator,
)
from mug.run.evaluators.intervals import Accuracy
from mug.run.evaluators.results import save_examples
from mug.run.reporting.records import NAMES, RESULTS, add_record, formatted
from mug.run.state.checkpoint import Checkpoint
from mug.run.state.restore import restore
from mug.run.training.recipe import Recipe
from mug.run.training.start import eval_context, open_evaluators, open_held_out

TIMEOUT = timedelta(hours=2)  # for a rank to wait for the others, which share the work evenly


@dataclass(frozen=True)
class Options:
    """The parsed command line. evals: the `Config` of each evaluation, by name."""

    checkpoint: Path
    evals: dict[str, EvalConfig]
    json: Path | None
    batch: int | None
    workers: int
    cache: str | None


def main(console: Console) -> None:
    evaluate(console, parse())


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Parse the command line.

    Raises:
        RunError: an unknown flag or evaluation, or a value out of range.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    following = itertools.zip_longest(arguments, arguments[1:], fillvalue="")
    named = [value if one == "--eval" else one.partition("=")[2] for one, value in following if _is_eval(one)]
    sections = {name: f"{name}." for name in dict.fromkeys(named)}
    parser = build_parser("evaluate.py", __doc__.splitlines()[0], sections)
    help_of_eval = f"evaluation to run, again for a further one: {', '.join(evaluator_names())}"
    parser.add_argument("--eval", type=str, action="append", help=help_of_eval)
    options = parse_options(parser, arguments, sections)
    if not options.evals:
        raise RunError(f"--eval is missing; give one or more of {', '.join(evaluator_names())}")
    return options


def _is_eval(argument: str) -> bool:
    return argument == "--eval" or argument.startswith("--eval=")


def build_parser(prog: str, description: str, sections: dict[str, str]) -> Parser:
    """Returns the parser of a command that evaluates a checkpoint.

    sections: what stands before the options of each evaluation, by its name: "" or "NAME.".
    """
    parser = Parser(prog=prog, description=description)
    add = parser.add_argument
    add("checkpoint", type=str, help="folder of a run, or one of its checkpoint-STEP folders")
    add("--json", type=str | None, default=None, help="file to add the results to, instead of the run's results.jsonl")
    add("--batch", type=int | None, default=None, help="images at once on a rank (the run's micro-batch)")
    add("--workers", type=int, default=2, help="processes per rank that decode images")
    add("--cache", type=str | None, default=None, help="folder for features and what is built once (the run's)")
    for name, prefix in sections.items():
        parser.add_class_arguments(find_evaluator(name).Config, prefix.rstrip(".") or None, skip={"every"})
    return parser


def parse_options(parser: Parser, arguments: Sequence[str] | None, sections: dict[str, str]) -> Options:
    """Parse the arguments (the process's, without any) by a parser of `build_parser`.

    Raises:
        RunError: an unknown flag, or a value out of range.
    """
    parsed = parser.parse_args(arguments)
    check_min(parsed, {"batch": 1, "workers": 0}, "--")
    evals = {}
    for name, prefix in sections.items():
        config = find_evaluator(name).Config
        fields = [field.name for field in dataclasses.fields(config) if field.name != "every"]
        evals[name] = config(**{field: parsed[f"{prefix}{field}"] for field in fields})
        check_config(evals[name], f"--{prefix}")
    file = Path(parsed.json) if parsed.json else None
    if file:
        check_writable_file(file, "--json")
    return Options(Path(parsed.checkpoint), evals, file, parsed.batch, parsed.workers, parsed.cache)


def parse_one(prog: str, name: str, description: str, arguments: Sequence[str] | None) -> Options:
    """Parse the command line of a command that is short for one evaluation: its options have no name before them.

    Raises:
        RunError: an unknown flag, or a value out of range.
    """
    sections = {name: ""}
    return parse_options(build_parser(prog, description.splitlines()[0], sections), arguments, sections)


def evaluate(console: Console, options: Options) -> None:
    """Run the evaluations on all ranks; show and save their results."""
    with process_group():
        console.info(f"reading {options.checkpoint}")
        model, tokenizer, found = restore(options.checkpoint, console.warn)
        context = offline_context(options, found, tokenizer, console)
        if options.json is None:
            check_writable(context.output, "the run's folder")
        evaluators = open_evaluators(options.evals, context, model)
        subject = Subject(model, model, lambda: model, found.step)
        for name, evaluator in evaluators.items():
            result = evaluator.run(subject)
            hardware.on_rank_zero(lambda result=result: keep(result, options.json or context.output / RESULTS))
            save_examples(result, context.output, found.step)
            show(name, result, console)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Start the process group, or one rank without a launcher; without DeepSpeed, whose import takes seconds."""
    rank, world = hardware.rank_and_world()
    hardware.limit_threads()
    hardware.use_device()
    hardware.start_process_group(rendezvous(rank, world), TIMEOUT)
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def offline_context(options: Options, found: Checkpoint, tokenizer: Any, console: Console) -> EvalContext:
    """Returns the context of the run's own evaluations, with this command's options."""
    recipe = Recipe.from_dict(found.manifest["recipe"])
    output = found.folder.resolve().parent
    context = eval_context(recipe, tokenizer, lambda: open_held_out(recipe), output, console)
    cache = options.cache or context.cache
    return dataclasses.replace(
        context,
        pairs=context.pairs and dataclasses.replace(context.pairs, cache=cache),
        micro_batch=options.batch or context.micro_batch,
        workers=options.workers,
        cache=cache,
        features=DataConfig(cache=cache).cache_folder() / "features",
    )


def keep(result: Result, file: Path) -> None:
    """Append the records to a file of results."""
    for record in result.records:
        add_record(file, record)


def show(name: str, result: Result, console: Console) -> None:
    """Show a line per result on the terminal."""
    for record in result.records:
        if "accuracy" in record:
            accuracy = Accuracy(tuple(record["values"]), record["test_images"])
            console.info(f"{record['method']}  {record['feature']:15}  {record['setting']:7}  {accuracy}")
            continue
        for metric, value in record.items():
            if metric not in NAMES:
                about = "  ".join(str(record[part]) for part in ("method", "setting") if part in record)
                console.info(f"{about}  {metric:26} {formatted(value):>10}")
    for what in ("captions", "translations", "pictures"):
        if found := getattr(result, what):
            console.info(f"{name}: {len(found):,} {what}, in the run's folder")


if __name__ == "__main__":
    run_command(main)
