"""The recipe: what a pre-training run is made of, from YAML and the command line. No torch in here."""

import dataclasses
import json
import operator
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse import SUPPRESS, Namespace

from mug.data.config import DataConfig
from mug.model.presets import ModelConfig, resolve
from mug.run.training.command_line import Parser
from mug.run.training.errors import RunError

RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT_RECIPE = RECIPES / "openmoji_tiny.yaml"


@dataclass(frozen=True)
class TrainerConfig:
    """How the model is trained.

    Args:
        global_batch: samples of one optimizer step, over all ranks and accumulation steps.
        micro_batch: samples that one rank puts through the model at once.
        max_steps: optimizer steps of the run; without it, `epochs` decides.
        epochs: passes over the data.
        base_learning_rate: AdamW's peak learning rate at a global batch of 256; scaled linearly (MAE).
        min_learning_rate: where the cosine ends.
        warmup_samples: samples over which the learning rate rises linearly.
        weight_decay: not on norms, biases, tokens and positions.
        betas: AdamW's.
        gradient_clipping: largest global gradient norm; 0 does not clip.
        log_every: steps between two rows of metrics.
        eval_every: steps between two evaluations on held-out pairs; also at the end.
        eval_samples: held-out pairs to evaluate on; all if there are fewer.
        recompute: what backward computes again to need less memory: nothing, elementwise (norms and activations) or
            blocks (all but each block's input).
        apex_adam: take NVIDIA apex's FusedAdam instead of the AdamW of the DeepSpeed JSON.
        apex_layer_norm: take NVIDIA apex's FusedLayerNorm instead of PyTorch's.
    """

    global_batch: int = 4096
    micro_batch: int = 64
    max_steps: int | None = None
    epochs: float = 1.0
    base_learning_rate: float = 1.5e-4
    min_learning_rate: float = 0.0
    warmup_samples: int = 0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clipping: float = 1.0
    log_every: int = 10
    eval_every: int = 1000
    eval_samples: int = 10000
    recompute: Literal["nothing", "elementwise", "blocks"] = "nothing"
    apex_adam: bool = False
    apex_layer_norm: bool = False

    @property
    def learning_rate(self) -> float:
        return self.base_learning_rate * self.global_batch / 256


@dataclass(frozen=True)
class PretrainTrainerConfig(TrainerConfig):
    """How the model is pre-trained.

    Args:
        knn: labelled images, as run/knn.py's --data, for the accuracy of nearest neighbours at each evaluation.
    """

    knn: str | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run's state is saved.

    Args:
        every_steps: steps between two checkpoints; also at the end.
        every_minutes: also after so many minutes without one, at a step that is logged; 0 leaves it to the steps.
        keep: how many of the newest to keep; those that a replay bundle starts from stay, too.
        asynchronous: copy the state to host memory and write it from there while training goes on.
    """

    every_steps: int = 1000
    every_minutes: float = 0
    keep: int = 3
    asynchronous: bool = False


@dataclass(frozen=True)
class SafetyConfig:
    """What to do when ranks go wrong.

    Args:
        hang_minutes: how long a rank may get no further before the run stops and names it; an evaluation's batch, a
            picture and a save must each take less.
    """

    hang_minutes: float = 10.0


@dataclass(frozen=True)
class PretrainSafetyConfig(SafetyConfig):
    """What to do when ranks or losses go wrong.

    Args:
        nonfinite: 'stop' at a step whose loss or gradient is not finite, or 'skip' its batch; nothing is updated.
        spike_factor: a logged loss above so many times the median of the last 32 logged ones is a spike: go back to
            an earlier checkpoint and skip the batches since then. 0 never does.
        spike_checkpoints: how many checkpoints to go back.
        max_skips: how many times in a run to skip batches before it stops after all.
    """

    nonfinite: Literal["stop", "skip"] = "stop"
    spike_factor: float = 0.0
    spike_checkpoints: int = 1
    max_skips: int = 10


@dataclass(frozen=True)
class Recipe:
    """One pre-training run.

    Args:
        objective: what is learned, a name in mug.model.mug.OBJECTIVES.
        loss_weights: factor of each term of the objective in the total loss; a term of factor 0 is not computed.
        seed: of weights, order of samples, crops and masks.
    """

    model: ModelConfig
    data: DataConfig
    trainer: PretrainTrainerConfig
    checkpoint: CheckpointConfig
    safety: PretrainSafetyConfig
    objective: str = "mug"
    loss_weights: dict[str, float] = field(default_factory=lambda: {"pixels": 1.0, "caption": 0.1})
    seed: int = 0

    @property
    def weighted(self) -> dict[str, float]:
        """The terms that are trained on, with their factors."""
        return {term: factor for term, factor in self.loss_weights.items() if factor}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The recipe that `dataclasses.asdict` made `values` of."""
        sections = {"model": ModelConfig, "data": DataConfig, "trainer": PretrainTrainerConfig}
        sections |= {"checkpoint": CheckpointConfig, "safety": PretrainSafetyConfig}
        return cls(**values | {name: section(**values[name]) for name, section in sections.items()})


@dataclass(frozen=True)
class Command:
    """What the command line says: the recipe, the DeepSpeed JSON, the folder of the run, and whether a run that was
    begun with another recipe may go on with this one."""

    recipe: Any
    deepspeed: Path
    output: Path
    allow_changes: bool


def build_parser() -> Parser:
    """The options of run/pretrain.py."""
    return recipe_parser("pretrain.py", "Pre-train MUG on image-text pairs.", Recipe, DEFAULT_RECIPE)


def recipe_parser(prog: str, description: str, recipe: type, default: Path) -> Parser:
    """The options of a command that trains by a recipe: a key each of the dataclass, and where things are."""
    parser = Parser(prog=prog, description=description)
    parser.add_argument("--config", action="config", help=f"recipe, a YAML file (default: {default.name})")
    parser.add_argument("--deepspeed", type=str | None, default=None, help="DeepSpeed JSON, from ds_configs/")
    parser.add_argument("--output", type=str | None, default=None, help="folder of the run (runs/RECIPE)")
    parser.add_argument(
        "--allow_changes",
        type=bool,
        default=False,
        help="go on with a run although keys of its recipe that decide what is learned have changed",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=SUPPRESS)  # the launcher's
    parser.add_class_arguments(recipe, as_group=False)
    return parser


def parse_command(arguments: list[str] | None = None) -> Command:
    """Parse the command line of run/pretrain.py.

    Raises:
        RunError: an unknown flag or recipe key, a value of the wrong type, a missing recipe or JSON.
        ModelConfigError: sizes that do not fit together.
    """
    command = parse_recipe(build_parser(), Recipe, DEFAULT_RECIPE, arguments)
    check_least(command.recipe, SAFETY_LEAST)
    return dataclasses.replace(command, recipe=dataclasses.replace(command.recipe, model=resolve(command.recipe.model)))


def parse_recipe(parser: Parser, recipe: type, default: Path, arguments: list[str] | None) -> Command:
    """Parse a command line of `recipe_parser`; without --config, the recipe is `default`.

    Raises:
        RunError: an unknown flag or recipe key, a value of the wrong type or out of range, a missing recipe or JSON.
    """
    values, parsed, output = read_recipe(parser, recipe, default, arguments)
    if parsed.deepspeed is None:
        raise RunError("--deepspeed is missing; name a DeepSpeed JSON, for example ds_configs/zero3.json")
    check_least(values, LEAST)
    if not values.safety.hang_minutes > 0:
        raise RunError(f"safety.hang_minutes must be more than 0, not {values.safety.hang_minutes}")
    return Command(values, Path(parsed.deepspeed), output, parsed.allow_changes)


def read_recipe(
    parser: Parser, recipe: type, default: Path, arguments: list[str] | None
) -> tuple[Any, Namespace, Path]:
    """The recipe, all that was parsed, and the folder of the run, of a parser with --config and --output.

    Raises:
        RunError: an unknown flag or recipe key, a value of the wrong type, a missing recipe.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    recipes, others = _split(arguments)
    recipe_file = Path(recipes[0]) if recipes else default
    if not recipe_file.is_file():
        shipped = ", ".join(sorted(path.name for path in default.parent.glob("*.yaml")))
        raise RunError(f"--config {recipe_file}: no such file; {default.parent.name}/ holds {shipped}")
    named_first = [f"--config={path}" for path in recipes or [default]]
    parsed = parser.parse_args([*named_first, *others])
    fields = dataclasses.fields(recipe)
    for one in fields:
        if parsed[one.name] is None and dataclasses.is_dataclass(one.type):
            raise RunError(f"{recipe_file}: section {one.name} is empty; give it keys, or leave it out")
    values = parser.instantiate(parsed)
    made = recipe(**{one.name: values[one.name] for one in fields})
    return made, parsed, Path(parsed.output or Path("runs") / recipe_file.stem)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Recipes, and all else: a flag changes what a recipe says wherever it stands, as users expect."""
    recipes, others, rest = [], [], iter(arguments)
    for argument in rest:
        if argument == "--config":
            recipes.append(next(rest, ""))
        elif argument.startswith("--config="):
            recipes.append(argument.partition("=")[2])
        else:
            others.append(argument)
    return recipes, others


def count_steps(trainer: TrainerConfig, samples: int) -> int:
    """Optimizer steps of the run: trainer.max_steps, or what trainer.epochs passes over the data make."""
    if trainer.max_steps is not None:
        return trainer.max_steps
    if (steps := int(trainer.epochs * samples // trainer.global_batch)) < 1:
        raise RunError(
            f"trainer.epochs {trainer.epochs} x {samples} samples is less than one global batch of"
            f" {trainer.global_batch}; raise trainer.epochs or name trainer.max_steps"
        )
    return steps


# What may change while a run goes on: how it is watched, saved and divided, where its data lie (the index's
# fingerprint tells whether they are the same), and how long it lasts.
FREE = ("checkpoint", "safety", "trainer.max_steps", "trainer.epochs", "trainer.micro_batch", "trainer.log_every")
FREE += ("trainer.eval_every", "trainer.eval_samples", "data.shards", "data.held_out", "data.tokenizer", "data.cache")
FREE += ("data.workers", "data.remote", "data.cache_gb", "data.ahead", "data.retry_seconds", "data.max_bad_samples")
FREE += ("data.max_bad_in_shard", "trainer.recompute", "trainer.knn", "init", "data.images", "data.test")


def changes(saved: dict[str, Any], recipe: Recipe) -> list[str]:
    """What decides what is learned and is not as in `saved`, the `dataclasses.asdict` of a recipe, through JSON."""
    before, now = _flat(saved), _flat(json.loads(json.dumps(dataclasses.asdict(recipe))))
    return [
        f"{name} {before[name]} (now {value})"
        for name, value in now.items()
        if name in before and before[name] != value and not name.startswith(FREE)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


# What a number must at least be; a run without a checkpoint, for one, could not go on.
LEAST = {
    "trainer.max_steps": 1,
    "trainer.epochs": 0,
    "trainer.base_learning_rate": 0,
    "trainer.min_learning_rate": 0,
    "trainer.warmup_samples": 0,
    "trainer.weight_decay": 0,
    "trainer.gradient_clipping": 0,
    "trainer.log_every": 1,
    "trainer.eval_every": 1,
    "trainer.eval_samples": 1,
    "checkpoint.every_steps": 1,
    "checkpoint.every_minutes": 0,
    "checkpoint.keep": 1,
    "seed": 0,
}
SAFETY_LEAST = {"safety.spike_factor": 0, "safety.spike_checkpoints": 1, "safety.max_skips": 0}


def check_least(recipe: Any, least: dict[str, float]) -> None:
    """Raise RunError unless the numbers of these dotted names are at least so large, and trainer.betas in range."""
    for name, bound in least.items():
        value = operator.attrgetter(name)(recipe)
        if value is not None and value < bound:
            raise RunError(f"{name} must be at least {bound}, not {value}")
    if not all(0 <= beta < 1 for beta in recipe.trainer.betas):
        raise RunError(f"trainer.betas must lie in [0, 1), not be {recipe.trainer.betas}")


def check_shares(recipe: Any, *names: str) -> None:
    """Raise RunError unless the numbers of these dotted names are more than 0 and at most 1."""
    for name in names:
        if not 0 < (share := operator.attrgetter(name)(recipe)) <= 1:
            raise RunError(f"{name} must be more than 0 and at most 1, not {share}")
