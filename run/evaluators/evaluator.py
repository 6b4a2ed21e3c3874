"""The contract between an evaluation and its caller: a run in training (`evals:`), or run/evaluate.py afterwards.

An evaluation is one file of this folder that defines one `Evaluator`, found by the file's name.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mug.data.config import DataConfig
from mug.data.kinds.samples import Samples
from mug.data.tokenizer import Tokenizer
from mug.model.objectives.objective import Objective, name_of
from mug.run.common.command_line import check_min
from mug.run.common.console import Console
from mug.run.common.errors import RunError
from mug.run.reporting.grid import Picture


@dataclass(frozen=True)
class EvalConfig:
    """Options of an evaluation.

    Args:
        every: steps between two of these evaluations in training; without it, trainer.eval_every.
    """

    every: int | None = None

    def check(self) -> None:
        """Raise RunError for a value out of range; the line begins with the option's name."""
        check_min(self, {"every": 1})


@dataclass(frozen=True)
class EvalContext:
    """What an evaluation works with.

    open_held_out: returns the held-out samples, by stream; those of a single stream by "".
    pairs: how the run reads image-text pairs; None where it reads none, or has held none out.
    tokenizer: of the objective's texts.
    loss_weights: factor of each active loss in the total.
    group: samples that may see each other, over all ranks.
    output: the run's folder.
    progress: called with what is being done, so that a rank that hangs is named.
    features: folder to keep the features of frozen encoders in; None where the encoder is new each time.
    """

    open_held_out: Callable[[], dict[str, Samples]]
    pairs: DataConfig | None
    tokenizer: Tokenizer | None
    loss_weights: dict[str, float]
    micro_batch: int
    group: int
    max_samples: int
    workers: int
    cache: str | None
    output: Path
    console: Console
    progress: Callable[[str], None] = lambda _: None
    features: Path | None = None

    @cached_property
    def held_out(self) -> dict[str, Samples]:
        """Returns the held-out samples, by stream; {} where there are none."""
        return self.open_held_out()

    def decode(self, tokens_BT: Tensor) -> list[str]:
        """Returns the texts that an objective has written, int64 [B, T], BOS … EOS PAD."""
        assert self.tokenizer is not None  # of the texts that it learned
        return [self.tokenizer.decode(row) for row in tokens_BT[:, 1:].tolist()]


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated.

    forward: as it is trained: sharded, in the run's precision; all ranks must call it equally often. With a function of
        (objective, batch) as second argument, it returns what that returns: see `CoupledObjective.forward`.
    make_whole: builds the objective with all of its weights on this rank's device, in eval mode: a collective call.
    """

    module: Objective
    forward: Callable[..., Any]
    make_whole: Callable[[], Objective]
    step: int

    @cached_property
    def whole(self) -> Objective:
        """Returns the complete objective, for each rank to use alone; built once, on all ranks at the same place."""
        return self.make_whole()


@dataclass(frozen=True)
class Result:
    """What an evaluation found, the same on all ranks.

    metrics: by name, for the run's curves.
    records: lines of results.jsonl, each with its `method` and what it was measured on; see mug.run.reporting.records.
    captions: lines of captions.jsonl: `key`, `written` and `true`.
    translations: lines of translations.jsonl: `key`, `source`, `written` in each way, and `true`.
    """

    metrics: dict[str, float]
    records: list[dict[str, Any]] = field(default_factory=list)
    captions: list[dict[str, Any]] = field(default_factory=list)
    translations: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


class Evaluator:
    """One evaluation. All ranks build it, run it at the same steps, and share its work."""

    Config: ClassVar[type[EvalConfig]]  # the section `evals.NAME` of a recipe, and options of run/evaluate.py
    needs: ClassVar[type] = Objective  # the ability that the objective must have

    def __init__(self, config: Any, context: EvalContext):
        self.config, self.context = config, context

    @classmethod
    def suits(cls, objective: type[Objective]) -> bool:
        """Whether objectives of this class have the ability, as far as the class alone shows."""
        return issubclass(objective, cls.needs)

    def check(self, objective: Objective) -> None:
        """Raise RunError or ObjectiveError if this objective cannot be evaluated like this; before training starts."""
        if not isinstance(objective, self.needs):
            ability = f"{self.needs.__doc__}".strip().rstrip(".")
            ability = ability[0].lower() + ability[1:]
            name = name_of(type(objective))
            raise RunError(f"evaluation {_name(type(self))} needs an objective that {ability}; {name} does not")

    def run(self, subject: Subject) -> Result:
        """Evaluate: a collective call."""
        raise NotImplementedError

    def encoder_name(self, subject: Subject) -> str:
        """Returns the name of what is evaluated, for a record."""
        return f"{self.context.output.resolve().name}, step {subject.step}"


def check_config(config: EvalConfig, prefix: str) -> None:
    """Raise RunError for a value out of range; `prefix` stands before the option's name in the message."""
    try:
        config.check()
    except RunError as error:
        raise RunError(f"{prefix}{error}") from None


def evaluator_names() -> list[str]:
    """Returns the names of the files of this folder that define an evaluation."""
    return sorted(name for name in _files() if _defined(name))


def find_evaluator(name: str) -> type[Evaluator]:
    """Returns the evaluation that the file NAME.py of this folder defines.

    Raises:
        RunError: it does not exist; the message lists those that do.
    """
    if name not in _files() or not (found := _defined(name)):
        raise RunError(f"{name!r} is not one of the evaluations {', '.join(evaluator_names())}")
    return found[0]


def _name(evaluator: type[Evaluator]) -> str:
    return evaluator.__module__.rpartition(".")[2]


def _files() -> list[str]:
    return [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name != "evaluator"]


def _defined(name: str) -> list[type[Evaluator]]:
    module = importlib.import_module(f"mug.run.evaluators.{name}")
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Evaluator) and value.__module__ == module.__name__
    ]
