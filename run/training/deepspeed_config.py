"""Read a DeepSpeed JSON strictly, and fill its `"auto"` values from the recipe.

DeepSpeed ignores keys that it does not know at the top level and in several sections, and quietly falls back to a
default where an `"auto"` was never filled: a typing error costs a training run. So every key is checked here, at every
level, before DeepSpeed sees the file. The file itself is never written.

One pass, top to bottom: parse → refuse duplicate, unknown and unsupported keys → validate the values against
`deepspeed_schema` → fill from the recipe → check what only makes sense together.
"""

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mug.run.common.errors import DeepSpeedConfigError

SHIPPED = Path(__file__).parents[2] / "ds_configs"
AUTO_IS_A_VALUE = {"data_types.keep_in_fp32_modules"}  # of DeepSpeed's own
# optimizer.params that only one of the two AdamW implementations takes.
TORCH_ADAM_ONLY = {"fused", "foreach"}
DEEPSPEED_ADAM_ONLY = {"bias_correction", "fp32_optimizer_states"}
# pydantic's kinds of error, in our words.
WORDS = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "finite_number": "must be a finite number",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeValues:
    """What the recipe decides and a DeepSpeed JSON may leave as `"auto"`."""

    global_batch: int
    micro_batch: int
    world_size: int
    gradient_clipping: float
    bf16: bool
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    width: int | None = None  # the model's hidden width, for ZeRO-3 buckets left as "auto"


def load_deepspeed_config(path: str | Path, values: RecipeValues) -> dict[str, Any]:
    """Return the checked and filled configuration, ready for `deepspeed.initialize(config=...)`.

    Keys that the recipe decides (batch sizes, clipping, bf16, AdamW's numbers) are filled where the file says
    `"auto"` or nothing; a concrete value must agree with the recipe.

    Raises:
        DeepSpeedConfigError: the file is missing or not JSON; a key appears twice, is unknown or unsupported;
            a value has the wrong type, contradicts the recipe, or is an `"auto"` nobody can fill.
    """
    from mug.run.training.deepspeed_schema import DeepSpeedJson

    path = _find(Path(path))
    parsed = _read_json(path)
    try:
        _check_keys(parsed, DeepSpeedJson, DeepSpeedJson)
        _validate(parsed, DeepSpeedJson)
        filled = _fill(_plain(parsed), _decided(values), values.width)
        _check_together(filled, values.world_size)
    except DeepSpeedConfigError as error:
        raise DeepSpeedConfigError(f"{path}: {error}") from None
    return filled


def check_batch(global_batch: int, micro_batch: int, world: int) -> int:
    """Return the accumulation steps that make `micro_batch × steps × world = global_batch`.

    Raises:
        DeepSpeedConfigError: a number is below 1, or the division leaves a remainder; the message shows the
            arithmetic and the nearest values that divide.
    """
    for name, number in (("global batch", global_batch), ("micro batch", micro_batch), ("world size", world)):
        if number < 1:
            raise DeepSpeedConfigError(f"{name} is {number}; it must be at least 1")
    per_step = micro_batch * world
    steps, rest = divmod(global_batch, per_step)
    if rest == 0:
        return steps
    fitting = [number * per_step for number in (steps, steps + 1) if number]
    fixes = [f"a global batch of {' or '.join(map(str, fitting))}"]
    if global_batch % world == 0:
        nearest = _nearest_divisors(global_batch // world, micro_batch)
        fixes.append(f"a micro batch of {' or '.join(map(str, nearest))}")
    raise DeepSpeedConfigError(
        f"global batch {global_batch} is not a multiple of micro batch {micro_batch} × {world} rank(s) = "
        f"{per_step} ({global_batch} = {steps} × {per_step} + {rest}); use {', or '.join(fixes)}"
    )


# --- Parse -------------------------------------------------------------------------------------------------


class _Object(dict):
    """A JSON object that remembers the keys it was given twice, so that they can be named by path."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.twice = [key for key, _ in pairs if key in seen or seen.add(key)]


def _find(path: Path) -> Path:
    """Return the file, or where it does not exist the shipped one that `ds_configs/NAME` names."""
    shipped = SHIPPED / path.name
    return shipped if not path.exists() and path.parent.parts == ("ds_configs",) and shipped.exists() else path


def _read_json(path: Path) -> _Object:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DeepSpeedConfigError(f"{path}: no such file{_nearby(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeepSpeedConfigError(f"{path}: cannot be read: {error}") from None
    try:
        parsed = json.loads(text, object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DeepSpeedConfigError(f"{path}: not valid JSON at {where}: {error.msg}") from None
    if not isinstance(parsed, _Object):
        raise DeepSpeedConfigError(f"{path}: must hold one JSON object, {{ … }}")
    return parsed


def _nearby(path: Path) -> str:
    names = sorted(entry.name for entry in path.parent.glob("*.json"))
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f"; did you mean {path.parent / close[0]}?"
    return f"; {path.parent} holds {', '.join(names)}" if names else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


# --- Keys --------------------------------------------------------------------------------------------------


def fields_of(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Return the model's keys, each with the model of its section, None where it takes a value."""
    fields: dict[str, type[BaseModel] | None] = {}
    for name, field in model.model_fields.items():
        if not (field.json_schema_extra or {}).get("deprecated"):
            kinds = (field.annotation, *get_args(field.annotation))
            section = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
            fields |= {key: section for key in (name, field.alias) if key}
    return fields


def _check_keys(section: _Object, model: type[BaseModel], root: type[BaseModel], path: str = "") -> None:
    from mug.run.training.deepspeed_schema import MIN, REFUSED

    if section.twice:
        raise DeepSpeedConfigError(f"{path}{section.twice[0]}: appears twice; keep one")
    fields = fields_of(model)
    for key, value in section.items():
        dotted = path + key
        if dotted in REFUSED:
            raise DeepSpeedConfigError(f"{dotted}: not supported: {REFUSED[dotted]}; remove it")
        if key not in fields:
            raise DeepSpeedConfigError(f"{dotted}: unknown key; {_fix(key, path, fields, root)}")
        if isinstance(value, dict) and fields[key]:
            _check_keys(value, fields[key], root, f"{dotted}.")
        elif fields[key]:
            raise DeepSpeedConfigError(f"{dotted}: must be a section, {{ … }}, not {json.dumps(value)}")
        elif isinstance(value, dict):
            raise DeepSpeedConfigError(f"{dotted}: takes a value, not a section")
        elif isinstance(value, float) and not math.isfinite(value):  # which Python's JSON takes
            raise DeepSpeedConfigError(f"{dotted}: {WORDS['finite_number']}, not {json.dumps(value)}")
        elif isinstance(value, int | float) and value < MIN.get(dotted, -math.inf):
            raise DeepSpeedConfigError(f"{dotted}: must be at least {MIN[dotted]}, not {json.dumps(value)}")


def _fix(key: str, path: str, fields: dict[str, Any], root: type[BaseModel]) -> str:
    elsewhere = next(_places(key, root), None)
    if elsewhere:
        return f"it belongs at {elsewhere}"
    close = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"known here: {', '.join(sorted(fields))}" if len(fields) <= 12 else "remove it"


def _places(key: str, model: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, section in fields_of(model).items():
        if name == key:
            yield path + name
        if section:
            yield from _places(key, section, f"{path}{name}.")


# --- Values ------------------------------------------------------------------------------------------------


def _validate(config: dict[str, Any], model: type[BaseModel]) -> None:
    """Let pydantic validate the values, and report its first error in one line."""
    try:
        model(**config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(part for part in first["loc"] if part not in ("str", "list[any]"))  # a union's alternatives
        wanted = WORDS.get(first["type"], first["msg"].replace("Input should be", "must be"))
        raise DeepSpeedConfigError(f"{key}: {wanted}, not {json.dumps(first['input'])}") from None


def _decided(values: RecipeValues) -> dict[str, tuple[str, Any]]:
    """dotted key → (what decides it, its value)."""
    accumulation = check_batch(values.global_batch, values.micro_batch, values.world_size)
    params = "optimizer.params."
    return {
        "train_batch_size": ("the recipe's global_batch", values.global_batch),
        "train_micro_batch_size_per_gpu": ("the recipe's micro_batch", values.micro_batch),
        "gradient_accumulation_steps": ("the recipe's global_batch / (micro_batch × ranks)", accumulation),
        "gradient_clipping": ("the recipe's gradient_clipping", values.gradient_clipping),
        "bf16.enabled": ("the recipe's trainer.precision (bf16)", values.bf16),
        params + "lr": ("the recipe's learning_rate", values.learning_rate),
        params + "betas": ("the recipe's betas", list(values.betas)),
        params + "eps": ("the trainer's eps", values.eps),
        params + "weight_decay": ("the recipe's weight_decay", values.weight_decay),
    }


def _fill(config: dict[str, Any], decided: dict[str, tuple[str, Any]], width: int | None) -> dict[str, Any]:
    for dotted, (name, value) in decided.items():
        *parents, key = dotted.split(".")
        section = config
        for parent in parents:
            section = section.setdefault(parent, {})
        given = section.setdefault(key, "auto")
        if given == "auto":
            section[key] = value
        elif not _same(given, value):
            raise DeepSpeedConfigError(
                f'{dotted} is {json.dumps(given)}, but {name} is {json.dumps(value)}; write "auto" here'
            )
    _fill_buckets(config.get("zero_optimization", {}), width)
    _refuse_auto(config)
    return config


def _fill_buckets(zero: dict[str, Any], width: int | None) -> None:
    """The sizes Hugging Face's Trainer derives from the hidden width."""
    if width is None:
        return
    sizes = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": width * width * 9 // 10,
        "stage3_param_persistence_threshold": 10 * width,
    }
    zero.update({key: size for key, size in sizes.items() if zero.get(key) == "auto"})


def _refuse_auto(section: dict[str, Any], path: str = "") -> None:
    for key, value in section.items():
        dotted = path + key
        if isinstance(value, dict):
            _refuse_auto(value, f"{dotted}.")
        elif value == "auto" and dotted not in AUTO_IS_A_VALUE:
            raise DeepSpeedConfigError(f'{dotted}: nothing in the recipe fills this "auto"; write a value')


def _same(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(_same, given, wanted))
    if isinstance(wanted, bool) or not isinstance(given, int | float):
        return given is wanted
    return math.isclose(given, wanted, rel_tol=1e-9)


def _check_together(config: dict[str, Any], world_size: int) -> None:
    zero = config.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))  # its model also takes "3"
    _check_optimizer(config.get("optimizer", {}))
    _check_accumulation(config, stage)
    if offloads(zero, "offload_param") and stage < 3:
        raise DeepSpeedConfigError(f"zero_optimization.offload_param: needs stage 3, and the stage is {stage}")
    for section in ("offload_param", "offload_optimizer"):
        if zero.get(section, {}).get("device") == "nvme":
            raise DeepSpeedConfigError(f'zero_optimization.{section}.device: "nvme" is not supported; write "cpu"')
    if offloads(zero, "offload_optimizer"):
        if stage < 1:
            raise DeepSpeedConfigError("zero_optimization.offload_optimizer: needs stage 1, 2 or 3, not 0")
        if _torch_adam(config) and config.get("zero_force_ds_cpu_optimizer", True):
            raise DeepSpeedConfigError(
                "optimizer.params.torch_adam: with offload_optimizer, DeepSpeed requires its own AdamW; "
                'write false, or set "zero_force_ds_cpu_optimizer": false at the top level'
            )
    if stage in (1, 2) and zero.get("allgather_bucket_size", 0) % 2:
        raise DeepSpeedConfigError(
            f"zero_optimization.allgather_bucket_size: stage {stage} needs an even number,"
            f" not {zero['allgather_bucket_size']}"
        )
    scaled = config.get("prescale_gradients", False) or config.get("gradient_predivide_factor", 1) != 1
    if stage >= 2 and scaled and zero.get("reduce_scatter", True):
        raise DeepSpeedConfigError(
            f"gradient_predivide_factor and prescale_gradients: stage {stage} takes neither; remove them, or set"
            ' "reduce_scatter": false in zero_optimization'
        )
    group = min(int(zero.get("zero_hpz_partition_size", 1)) or 1, world_size)
    if world_size % group:
        raise DeepSpeedConfigError(
            f"zero_optimization.zero_hpz_partition_size: {world_size} ranks do not divide into "
            f"groups of {group}; write the number of accelerators in one node"
        )


def _check_accumulation(config: dict[str, Any], stage: int) -> None:
    precision = "bf16" if config["bf16"]["enabled"] else "fp32"
    accumulated = config.get("data_types", {}).get("grad_accum_dtype", precision)
    if stage == 0 and accumulated.lower() != precision:
        raise DeepSpeedConfigError(
            f"data_types.grad_accum_dtype: stage 0 accumulates gradients in the model's precision, {precision}, not"
            f' {accumulated}; remove the key, or write "stage": 1'
        )


def _check_optimizer(optimizer: dict[str, Any]) -> None:
    kind = optimizer.get("type")
    if kind is None:
        raise DeepSpeedConfigError('optimizer.type: missing; write "type": "AdamW"')
    if kind.lower() != "adamw":
        raise DeepSpeedConfigError(f'optimizer.type: "{kind}" is not supported; write "AdamW"')
    torch_adam = optimizer["params"].get("torch_adam", False)
    for key in optimizer["params"]:
        if key in (DEEPSPEED_ADAM_ONLY if torch_adam else TORCH_ADAM_ONLY):
            raise DeepSpeedConfigError(
                f'optimizer.params.{key}: works only with "torch_adam": {"false" if torch_adam else "true"}'
            )


def _torch_adam(config: dict[str, Any]) -> bool:
    return config["optimizer"]["params"].get("torch_adam", False)


def offloads(zero: dict[str, Any], section: str) -> bool:
    """Whether a section of `zero_optimization` moves something off the device."""
    return (zero.get(section) or {}).get("device", "none") != "none"


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    """The divisors of `number` next below and above `wanted`."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    below = [d for d in divisors if d < wanted][-1:]
    return below + [d for d in divisors if d > wanted][:1]
