"""The recipe of a run, from YAML and the command line: one shape for every objective, kind of batch and evaluation."""

import contextlib
import dataclasses
import itertools
import json
import math
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import SUPPRESS

from mug.data.kinds.samples import Samples, find_kind
from mug.data.mixture import StreamConfig
from mug.data.store.expand import without_signatures
from mug.data.tokenizer import Tokenizer
from mug.model.objectives.objective import Context, Objective, find_objective
from mug.model.presets import Vocabulary, resolve
from mug.run.cluster.config import FaultsConfig
from mug.run.common.command_line import Parser, check_min
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import check_config, find_evaluator
from mug.run.state.config import CheckpointConfig

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class TrainerConfig:
    """How the model is trained.

    Args:
        global_batch: samples of one optimizer step, over all ranks and accumulation steps.
        groups: parts of a global batch, of equal size, whose samples see each other where the objective couples them
            (in-batch negatives, batch norms); of a mixture of streams, each group is of one of them.
        micro_batch: most samples that one rank puts through the model at once; its share of a group, if less.
        max_steps: optimizer steps of the run; without it, `epochs` decides.
        epochs: passes over the data.
        base_learning_rate: AdamW's peak learning rate at a global batch of 256; scaled linearly (MAE).
        min_learning_rate: where the schedule ends.
        schedule: from the peak along half a cosine, or linear along a straight line.
        warmup_samples: samples over which the learning rate rises linearly.
        weight_decay: not on norms, biases, tokens and positions.
        layer_decay: factor on the learning rate from each layer of the encoder to the one below it.
        betas: AdamW's.
        gradient_clipping: largest global gradient norm; 0 does not clip.
        log_every: steps between two rows of metrics.
        tracker: wandb also logs them to Weights & Biases (pip install mug[wandb]).
        eval_every: steps between two evaluations on held-out samples; also at the end.
        eval_samples: held-out samples whose losses are evaluated, spread over the set; all if there are fewer.
        precision: of weights and activations: bf16 (with fp32 master weights and accumulated gradients), fp32, or auto:
            bf16 on GPUs, fp32 on CPUs.
        activation_checkpointing: what backward computes again to need less memory: none, elementwise (norms and
            activations) or blocks (all but each block's input).
        compile: put the model's blocks through torch.compile, which takes a minute or more at the first steps.
        apex_adam: take NVIDIA apex's FusedAdam instead of the AdamW of the DeepSpeed JSON.
        apex_layer_norm: take NVIDIA apex's FusedLayerNorm instead of PyTorch's.
    """

    global_batch: int = 4096
    groups: int = 1
    micro_batch: int = 64
    max_steps: int | None = None
    epochs: float = 1.0
    base_learning_rate: float = 1.5e-4
    min_learning_rate: float = 0.0
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup_samples: int = 0
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clipping: float = 1.0
    log_every: int = 10
    tracker: Literal["wandb"] | None = None
    eval_every: int = 1000
    eval_samples: int = 10000
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    activation_checkpointing: Literal["none", "elementwise", "blocks"] = "none"
    compile: bool = False
    apex_adam: bool = False
    apex_layer_norm: bool = False

    @property
    def learning_rate(self) -> float:
        return self.base_learning_rate * self.global_batch / 256


@dataclass(frozen=True)
class Recipe:
    """One run.

    Args:
        objective: what is learned: the name of a file in model/objectives/.
        model: the objective's `Config`, resolved.
        data: the `Config` of the objective's kind of batch; of several streams, a `StreamConfig` each by name.
        evals: the `Config` of each evaluation, by name: a file in run/evaluators/.
        loss_weights: factor of each loss of the objective in the total; a loss of factor 0 is not computed.
        init: weights for the encoder to begin with: the folder of a run or of one of its checkpoints, or a file of an
            encoder in timm's, MAE's or transformers' layout (.safetensors, .pth, a training checkpoint too), or a
            folder of `save_pretrained`. Without it, from scratch. Or for several parts of the model, by name; of parts
            other than `encoder`, a run that has the same part, or a file of its state dict. `language_model` is a
            folder of `save_pretrained` of an mBART or XLM-R, for all parts of `unix2` that read or write text.
        rates: part of the model → factor on its learning rate; 0 freezes it.
        seed: of weights, order of samples, crops and masks.
    """

    objective: str
    model: Any
    data: Any
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    faults: FaultsConfig
    evals: dict[str, Any] = field(default_factory=dict)
    loss_weights: dict[str, float] = field(default_factory=dict)
    init: str | dict[str, str] | None = None
    rates: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def active_losses(self) -> dict[str, float]:
        """Returns the losses that are trained on, with their factors."""
        return {name: factor for name, factor in self.loss_weights.items() if factor}

    def context(self, samples: Samples) -> Context:
        """Returns what the objective knows of data and recipe."""
        tokenizer = samples.tokenizer
        return Context(
            seed=self.seed,
            vocabulary=tokenizer and vocabulary_of(tokenizer),
            class_names=tuple(samples.class_names),
            losses=tuple(self.active_losses),
        )

    @property
    def streams(self) -> dict[str, StreamConfig]:
        """Returns the streams by name; a single one has the name ""."""
        if isinstance(self.data, dict):
            return self.data
        return {"": StreamConfig(self.data, find_objective(self.objective).kinds[0])}

    @property
    def workers(self) -> int:
        """Processes per rank that read samples."""
        return max(stream.config.workers for stream in self.streams.values())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Returns the recipe that `dataclasses.asdict` turned into `values`."""
        objective = find_objective(values["objective"])
        sections: dict[str, Any] = {"model": objective.Config(**values["model"])}
        sections |= {"data": _data_from_dict(objective, values["data"])}
        for name, section in SECTIONS.items():
            sections[name] = section(**values[name])
        sections["evals"] = {name: find_evaluator(name).Config(**one) for name, one in values["evals"].items()}
        return cls(**values | sections)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Returns what a model needs of the tokenizer."""
    t = tokenizer
    languages = {"languages": t.languages, "language_ids": t.language_ids}
    return Vocabulary(size=t.vocab_size, pad=t.pad, bos=t.bos, eos=t.eos, mask=t.mask, **languages)


def stream_kinds(data: Any) -> dict[str, str]:
    """Returns stream → kind of a recipe's section `data`, where it names streams: then each value has a weight."""
    several = (
        isinstance(data, dict) and data and all(isinstance(one, dict) and "weight" in one for one in data.values())
    )
    return {str(name): str(one.get("kind", "pairs")) for name, one in data.items()} if several else {}


def stream_options(kind: str) -> type:
    """The options of a stream of a mixture: those of its kind, side by side with `kind` and `weight`."""
    config = find_kind(kind).Config
    fields = [("kind", str, field(default=kind)), ("weight", float, field(default=1.0))]
    return dataclasses.make_dataclass(
        "StreamOptions", fields, bases=(config,), frozen=config.__dataclass_params__.frozen
    )


def stream_of(options: Any) -> StreamConfig:
    """The stream that an instance of `stream_options` describes."""
    config = find_kind(options.kind).Config
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(config)}
    return StreamConfig(config(**values), options.kind, options.weight)


def _data_from_dict(objective: type[Objective], data: dict[str, Any]) -> Any:
    if kinds := stream_kinds(data):
        return {
            name: StreamConfig(find_kind(kind).Config(**data[name]["config"]), kind, data[name]["weight"])
            for name, kind in kinds.items()
        }
    return find_kind(objective.kinds[0]).Config(**data)


SECTIONS = {"trainer": TrainerConfig, "checkpoint": CheckpointConfig, "faults": FaultsConfig}


@dataclass(frozen=True)
class Command:
    """The parsed command line: the recipe, the DeepSpeed JSON, the folder of the run, and whether a run that was
    begun with another recipe may be resumed with this one."""

    recipe: Recipe
    deepspeed: Path
    output: Path
    allow_changes: bool

    def on_ranks(self, world: int) -> "Command":
        """Returns the command with a micro-batch of at most a rank's share of a group, where the ranks divide one."""
        trainer = self.recipe.trainer
        share, rest = divmod(trainer.global_batch // trainer.groups, world)
        if rest or not 0 < share < trainer.micro_batch:
            return self
        trainer = dataclasses.replace(trainer, micro_batch=share)
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, trainer=trainer))


@dataclass(frozen=True)
class Named:
    """What decides which other options there are.

    streams: name → kind; empty where there is one stream, without a name.
    """

    objective: str
    evals: tuple[str, ...] = ()
    streams: dict[str, str] = field(default_factory=dict)


def build_parser(prog: str, description: str, named: Named) -> Parser:
    """Returns the parser of a command that trains: an option for each key of the recipe, and the paths.

    Raises:
        ObjectiveError, DataError, RunError: the objective, kind of data or evaluation does not exist.
    """
    objective = find_objective(named.objective)
    parser = Parser(prog=prog, description=description)
    parser.add_argument("--config", action="config", help="recipe, a YAML file of run/recipes/")
    parser.add_argument("--output", type=str | None, default=None, help="folder of the run (runs/RECIPE)")
    parser.add_argument(
        "--allow_changes",
        type=bool,
        default=False,
        help="resume a run although keys of its recipe that decide what is learned have changed",
    )
    parser.add_argument("--deepspeed", type=str | None, default=None, help="DeepSpeed JSON, from ds_configs/")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=SUPPRESS)  # the launcher's
    parser.add_argument("--objective", type=str, help="what is learned: the name of a file in model/objectives/")
    parser.add_class_arguments(objective.Config, "model")
    for name, kind in named.streams.items():
        if kind not in objective.kinds:
            raise RunError(f"data.{name}: {named.objective} learns from {', '.join(objective.kinds)}, not from {kind}")
        parser.add_class_arguments(stream_options(kind), f"data.{name}")
    if not named.streams:
        parser.add_class_arguments(find_kind(objective.kinds[0]).Config, "data")
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    for name in named.evals:
        parser.add_class_arguments(find_evaluator(name).Config, f"evals.{name}")
    weights = "factor of each loss in the total; a loss of factor 0 is not computed"
    parser.add_argument("--loss_weights", type=dict[str, float], default=dict(objective.losses), help=weights)
    init = "weights for the encoder to begin with, or for each of several parts"
    parser.add_argument("--init", type=str | dict[str, str] | None, default=None, help=init)
    rates = "factor on the learning rate of parts of the model, such as encoder; 0 freezes one"
    parser.add_argument("--rates", type=dict[str, float], default={}, help=rates)
    parser.add_argument("--seed", type=int, default=0, help="of weights, order of samples, crops and masks")
    return parser


def parse_command(prog: str, description: str, default: Path, arguments: Sequence[str] | None = None) -> Command:
    """Parse the command line of a command that trains; without --config, the recipe is `default`.

    Raises:
        RunError: an unknown flag or recipe key, a value of the wrong type or out of range, a missing recipe or JSON.
        ObjectiveError: the objective does not exist.
        ModelConfigError: sizes that do not fit together.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    recipes, others = _split(arguments)
    recipe_file = Path(recipes[0]) if recipes else default
    if not recipe_file.is_file():
        raise RunError(f"--config {recipe_file}: no such file; {RECIPES.name}/ holds {', '.join(_shipped())}")
    named = _named(recipes or [str(default)], others, default)
    parser = build_parser(prog, description, named)
    named_first = [f"--config={path}" for path in recipes or [default]]
    parsed = parser.parse_args([*named_first, *others])
    for section in ("model", "data", *SECTIONS):
        if parsed[section] is None:
            raise RunError(f"{recipe_file}: section {section} is empty; give it keys, or leave it out")
    values = parser.instantiate(parsed)
    streams = {name: stream_of(values.data[name]) for name in named.streams}
    if streams and not any(stream.weight for stream in streams.values()):
        raise RunError(f"data: the streams {', '.join(streams)} all have weight 0; give one a positive weight")
    recipe = Recipe(
        objective=named.objective,
        data={name: stream for name, stream in streams.items() if stream.weight} or values.data,
        evals={name: values.evals[name] for name in named.evals},
        **{name: values[name] for name in ("model", *SECTIONS, "loss_weights", "init", "rates", "seed")},
    )
    if parsed.deepspeed is None:
        raise RunError("--deepspeed is missing; give a DeepSpeed JSON, for example ds_configs/zero3.json")
    output = Path(parsed.output or Path("runs") / recipe_file.stem)
    return Command(checked(recipe), Path(parsed.deepspeed), output, parsed.allow_changes)


def checked(recipe: Recipe) -> Recipe:
    """Returns the recipe with its model resolved.

    Raises:
        RunError: a number out of range, or a weight of a loss that the objective does not have.
        ModelConfigError: sizes that do not fit together.
    """
    check_min(recipe, MIN)
    check_fractions(recipe, "trainer.layer_decay")
    check_betas(recipe.trainer.betas)
    if not 0 < (minutes := recipe.faults.hang_minutes) <= MAX_HANG_MINUTES:
        raise RunError(f"faults.hang_minutes must be more than 0 and at most {MAX_HANG_MINUTES:,}, not {minutes}")
    if recipe.trainer.global_batch % recipe.trainer.groups:
        raise RunError(
            f"trainer.groups {recipe.trainer.groups} does not divide trainer.global_batch {recipe.trainer.global_batch}"
        )
    check_loss_weights(recipe)
    for part, rate in recipe.rates.items():
        if not 0 <= rate < math.inf:
            raise RunError(f"rates.{part} must be at least 0, not {rate}")
    for name, config in recipe.evals.items():
        check_config(config, f"evals.{name}.")
    recipe = dataclasses.replace(recipe, model=resolve(recipe.model))
    check_crops(recipe)
    return recipe


def _shipped() -> list[str]:
    return sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml"))


def _named(recipes: Sequence[str], others: Sequence[str], default: Path) -> Named:
    """Returns what recipes and options name; a recipe that cannot be read is left to the parser, which reports it."""
    objective, evals, streams = default.parent.name, None, {}
    for path in recipes:
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
            if isinstance(values, dict):
                objective = values.get("objective", objective)
                streams |= stream_kinds(values.get("data"))
                if "evals" in values:
                    evals = (evals or set()) | set(values["evals"] or ())
    evals = {"losses"} if evals is None else evals
    for option, following in itertools.zip_longest(others, others[1:], fillvalue=""):
        name, _, value = option.partition("=")
        if name == "--objective":
            objective = value or following
        elif name.startswith("--evals."):
            evals.add(name.split(".")[1])
    return Named(str(objective), tuple(sorted(map(str, evals))), streams)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into recipes and the rest: a flag overrides a recipe wherever it stands, as users expect."""
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
    """Returns the optimizer steps of the run: trainer.max_steps, or those of trainer.epochs passes over the data."""
    if trainer.max_steps is not None:
        return trainer.max_steps
    if (steps := int(trainer.epochs * samples // trainer.global_batch)) < 1:
        raise RunError(
            f"trainer.epochs {trainer.epochs} x {samples} samples is less than one global batch of"
            f" {trainer.global_batch}; raise trainer.epochs or set trainer.max_steps"
        )
    return steps


# What may change when a run resumes: how it is monitored, saved and divided, where its data are (the index's
# fingerprint shows whether they are the same), and how long it lasts.
MUTABLE_ON_RESUME = (
    "checkpoint",
    "faults",
    "trainer.max_steps",
    "trainer.epochs",
    "trainer.micro_batch",
    "trainer.log_every",
    "trainer.tracker",
    "trainer.eval_every",
    "trainer.eval_samples",
    "data.shards",
    "data.held_out",
    "data.tokenizer",
    "data.labels",
    "data.cache",
    "data.workers",
    "data.remote",
    "data.cache_gb",
    "data.prefetch",
    "data.retry_seconds",
    "data.max_bad_fraction",
    "data.max_bad_fraction_in_shard",
    "trainer.precision",
    "trainer.activation_checkpointing",
    "trainer.compile",
    "evals",
    "init",
    "data.images",
    "data.test",
    "data.folder",
)


def recorded(recipe: Any) -> dict[str, Any]:
    """Returns the values of a recipe as files may keep them: URLs without their signatures."""

    def public(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: public(one) for name, one in value.items()}
        return without_signatures(value) if isinstance(value, str) else value

    return public(dataclasses.asdict(recipe))


def changes(saved: dict[str, Any], recipe: Recipe) -> list[str]:
    """Returns the keys that decide what is learned and differ from `saved`, a recipe as `recorded`, through JSON."""
    fresh = json.loads(json.dumps(recorded(recipe)))
    before, now, had, has = flat(saved), flat(fresh), _streams(saved), _streams(fresh)
    changed = [f"no stream data.{name} (now there)" for name in has if name not in had]
    changed += [f"a stream data.{name} (now gone)" for name in had if name not in has]
    return changed + [
        f"{name} {before[name]} (now {value})"
        for name, value in now.items()
        if name in before and before[name] != value and not _is_free(name)
    ]


def _streams(values: dict[str, Any]) -> list[str]:
    """Returns the names of the streams of a recorded recipe; of a single one, none."""
    return [name for name, one in values["data"].items() if isinstance(one, dict) and "config" in one]


def _is_free(name: str) -> bool:
    if name.startswith("data.") and ".config." in name:  # of a stream with a name
        name = f"data.{name.partition('.config.')[2]}"
    return any(name == free or name.startswith(f"{free}.") for free in MUTABLE_ON_RESUME)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested keys as dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


# Minima of numbers; a run without a checkpoint, for one, could not be resumed.
MIN = {
    **{f"trainer.{name}": 1 for name in ("global_batch", "groups", "micro_batch", "max_steps")},
    **{f"trainer.{name}": 1 for name in ("log_every", "eval_every", "eval_samples")},
    **{f"trainer.{name}": 0 for name in ("epochs", "base_learning_rate", "min_learning_rate", "warmup_samples")},
    **{f"trainer.{name}": 0 for name in ("weight_decay", "gradient_clipping")},
    **{"checkpoint.every_steps": 1, "checkpoint.every_minutes": 0, "checkpoint.keep": 1, "seed": 0},
    **{"faults.spike_factor": 0, "faults.spike_checkpoints": 1, "faults.max_skips": 0},
}
MAX_HANG_MINUTES = 1_000_000  # two years; what waits for ranks counts in integers of limited size


def check_betas(betas: tuple[float, float]) -> None:
    """Raise RunError unless AdamW accepts these betas."""
    if not all(0 <= beta < 1 for beta in betas):
        raise RunError(f"trainer.betas must lie in [0, 1), not be {betas}")


def check_loss_weights(recipe: Recipe) -> None:
    """Raise RunError unless the weights are those of the objective's losses, none below 0, and one above 0."""
    names = find_objective(recipe.objective).losses
    if set(recipe.loss_weights) != set(names):
        raise RunError(f"loss_weights has {', '.join(recipe.loss_weights)}; {recipe.objective} has {', '.join(names)}")
    for name, weight in recipe.loss_weights.items():
        if not weight >= 0:
            raise RunError(f"loss_weights.{name} must be at least 0, not {weight}")
    if not recipe.active_losses:
        raise RunError("loss_weights are all 0: nothing would be trained; set one above 0")


def check_crops(recipe: Recipe) -> None:
    """Raise RunError where the data's crops are set, and the objective's views have their own."""
    if not find_objective(recipe.objective).views(recipe.model):
        return
    scales = [f"model.{one.name}" for one in dataclasses.fields(recipe.model) if one.name.endswith("_scale")]
    instead = {"crop_scale": f"set {' and '.join(scales)} instead", "flip": "the objective decides on mirroring"}
    for stream, options in recipe.streams.items():
        for one in dataclasses.fields(options.config):
            if one.name in instead and getattr(options.config, one.name) != one.default:
                raise RunError(
                    f"{'.'.join(filter(None, ('data', stream, one.name)))} does not apply to the views of"
                    f" {recipe.objective}: leave it out; {instead[one.name]}"
                )


def check_fractions(recipe: Any, *names: str) -> None:
    """Raise RunError unless the numbers of these dotted names are more than 0 and at most 1."""
    for name in names:
        if not 0 < (fraction := operator.attrgetter(name)(recipe)) <= 1:
            raise RunError(f"{name} must be more than 0 and at most 1, not {fraction}")
