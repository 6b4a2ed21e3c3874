"""Read a DeepSpeed JSON strictly, and fill its `"auto"` values from the recipe.

DeepSpeed ignores keys that it does not know at the top level and in several sections, and quietly falls
back to a default where an `"auto"` was never filled: a typing error costs a training run. So every key is
checked here, at every level, before DeepSpeed sees the file. The file itself is never written.

One pass, top to bottom: parse → refuse duplicates, unknown and unsupported keys → fill from the recipe →
let DeepSpeed's own models check the values → check what only makes sense together.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

Number = (int, float)
# key → Schema of a section | type(s) | a set of words (any case) | object, where DeepSpeed's model checks it
Schema = dict[str, Any]


class DeepSpeedConfigError(Exception):
    """One line for the user: the file, the key as a dotted path, what is wrong and the mend."""


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


# ---------------------------------------------------------------------------------------------------------
# What may stand in the file
# ---------------------------------------------------------------------------------------------------------

# Sections that DeepSpeed describes by a pydantic model: the keys are read from it, so they follow DeepSpeed.
MODELS = {
    "zero_optimization": "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
    "bf16": "deepspeed.runtime.precision_config.DeepSpeedBF16Config",
    "comms_logger": "deepspeed.comm.config.CommsLoggerConfig",
    "tensorboard": "deepspeed.monitor.config.TensorBoardConfig",
    "wandb": "deepspeed.monitor.config.WandbConfig",
    "csv_monitor": "deepspeed.monitor.config.CSVConfig",
    "comet": "deepspeed.monitor.config.CometConfig",
    "timers.throughput": "deepspeed.utils.config.DeepSpeedThroughputTimerConfig",
}

# The rest has no model in DeepSpeed (it reads these keys one by one), so keys and types are listed.
DTYPES = frozenset({"fp32", "bf16", "fp16"})
TABLE: Schema = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "gradient_clipping": Number,
    "gradient_predivide_factor": Number,
    "prescale_gradients": bool,
    "communication_data_type": DTYPES,
    "steps_per_print": (int, type(None)),
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "disable_python_gc": bool,
    "log_level": frozenset({"debug", "info", "warning", "error", "critical"}),
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "optimizer": {
        "type": str,
        "params": {
            "lr": Number,
            "betas": list,
            "eps": Number,
            "weight_decay": Number,
            "torch_adam": bool,
            "fused": bool,
            "foreach": bool,
            "bias_correction": bool,
            "fp32_optimizer_states": bool,
        },
    },
    "data_types": {"grad_accum_dtype": DTYPES, "keep_in_fp32_modules": (str, list)},
    "checkpoint": {
        "tag_validation": frozenset({"ignore", "warn", "fail"}),
        "load_universal": bool,
        "use_node_local_storage": bool,
        "parallel_write": {"pipeline_stage": bool},
        "checkpoint_serialization": bool,
        "writer": {
            "type": frozenset({"mock", "python", "fast"}),
            "decoupled": bool,
            "io_buffer_size": Number,
            "io_buffer_double": bool,
            "io_multiplier": int,
            "show_statistics": bool,
            "data_parallel": frozenset({"replica", "socket", "machine"}),
        },
    },
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": Number,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": (str, type(None)),
    },
    "aio": {
        "block_size": int,
        "queue_depth": int,
        "intra_op_parallelism": int,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
    "timers": {},  # its one section comes from MODELS
}

_OWN_LOADER = "batches come from the project's own loader, which DeepSpeed does not drive"
_DATA_PARALLEL = "the trainer is data-parallel (ZeRO) only"
_SECOND = "checkpoints do not hold the state of a second optimizer"
_PRECISION = "the trainer runs in bf16 on GPUs and in fp32 on CPUs"
_REMOVED = "DeepSpeed has removed it"

# Keys that DeepSpeed knows, or knew, and this trainer cannot honour.
REFUSED = {
    "scheduler": "the trainer sets the learning rate itself; use the recipe's schedule",
    "fp16": _PRECISION,
    "bfloat16": 'this is the old name; use "bf16"',
    "amp": _REMOVED + '; use "bf16"',
    "torch_autocast": _PRECISION,
    "data_types.param_dtype": _PRECISION,
    "data_types.buffer_dtype": _PRECISION,
    "gradient_allreduce_op": "gradients are averaged over ranks; the recipe's learning rate counts on it",
    "managed_gradient_accumulation": "accumulation is left to DeepSpeed's engine",
    "activation_checkpointing": "only models that call deepspeed.checkpointing use it, and ours do not",
    "checkpoint.load_universal": "the trainer resumes from its own checkpoints, which any number of ranks can read",
    "checkpoint.use_node_local_storage": "a checkpoint is sealed in one folder that all ranks share",
    "checkpoint.writer": "a checkpoint must be whole before it is sealed",
    "bf16.check_grad_overflow": "a step whose gradient is not finite is never taken",
    "zero_optimization.compute_grad_norm": "a gradient that is not finite shows in the norm",
    "compile": "it needs engine.compile(), which the trainer does not call",
    "disable_allgather": "DeepSpeed reads it and does nothing with it",
    "vocabulary_size": "DeepSpeed only warns about alignment with it",
    "dataloader_drop_last": _OWN_LOADER,
    "data_efficiency": _OWN_LOADER,
    "curriculum_learning": _OWN_LOADER,
    "pipeline": _DATA_PARALLEL,
    "tensor_parallel": _DATA_PARALLEL,
    "expert_parallel": _DATA_PARALLEL,
    "data_parallel_size": _DATA_PARALLEL,
    "sequence_parallel_size": _DATA_PARALLEL,
    "seq_parallel_communication_data_type": _DATA_PARALLEL,
    "use_data_before_expert_parallelism": _DATA_PARALLEL,
    "hybrid_engine": "it is for reinforcement learning with generation",
    "weight_quantization": "it is for inference",
    "autotuning": "the batch sizes belong to the recipe",
    "datastates_ckpt": "checkpoints are committed by the trainer",
    "comet.api_key": "a secret does not belong in a configuration; set COMET_API_KEY",
    "optimizer.legacy_fusion": "it is for fp16, which the trainer does not run",
    "optimizer.params.max_grad_norm": 'use "gradient_clipping" at the top level',
    "optimizer.params.adam_w_mode": 'it does nothing for type "AdamW"',
    "optimizer.params.amsgrad": "checkpoints hold AdamW's two moments, not a third",
    "zero_optimization.offload_optimizer.ratio": _SECOND,
    "zero_optimization.offload_optimizer.super_offload": _SECOND,
    "zero_optimization.zenflow": "it needs its own optimizer schedule, which the trainer does not drive",
    "zero_optimization.legacy_stage1": _REMOVED,
    "zero_optimization.elastic_checkpoint": _REMOVED + "; convert to a universal checkpoint instead",
    "zero_optimization.pipeline_loading_checkpoint": _DATA_PARALLEL,
    "zero_optimization.save_muon_momentum_buffer_in_memory": 'the optimizer is "AdamW"',
    "zero_optimization.mics_shard_size": _REMOVED + '; use "zero_hpz_partition_size"',
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED + '; use "zero_hpz_partition_size"',
    "zero_optimization.zeropp_loco_param": _REMOVED,
    "nebula": _REMOVED,
    "compression_training": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_gradients": _REMOVED,
    "sparse_attention": _REMOVED,
    "eigenvalue": _REMOVED,
    "elasticity": _REMOVED + "; set the batch sizes in the recipe",
    "graph_harvesting": _REMOVED,
    "progressive_layer_drop": _REMOVED,
}

# Here "auto" is a value of DeepSpeed's own.
AUTO_IS_A_VALUE = {"data_types.keep_in_fp32_modules"}

# optimizer.params that only one of the two AdamW implementations takes.
TORCH_ADAM_ONLY = {"fused", "foreach"}
DEEPSPEED_ADAM_ONLY = {"bias_correction", "fp32_optimizer_states"}


# ---------------------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------------------


def load_deepspeed_config(path: str | Path, values: RecipeValues) -> dict[str, Any]:
    """Return the checked and filled configuration, ready for `deepspeed.initialize(config=...)`.

    Keys that the recipe decides (batch sizes, clipping, bf16, AdamW's numbers) are filled where the file says
    `"auto"` or nothing; a concrete value must agree with the recipe.

    Raises:
        DeepSpeedConfigError: the file is missing or no JSON; a key stands twice, is unknown or unsupported;
            a value has the wrong type, contradicts the recipe, or is an `"auto"` nobody can fill.
    """
    path = Path(path)
    parsed = _read_json(path)
    schema = _schema()
    try:
        _check_keys(parsed, schema, schema, ())
        filled = _fill(_plain(parsed), _decided(values), values.width)
        _check_values(filled)
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
    at_once = micro_batch * world
    steps, rest = divmod(global_batch, at_once)
    if rest == 0:
        return steps
    fitting = [number * at_once for number in (steps, steps + 1) if number]
    mends = [f"a global batch of {' or '.join(map(str, fitting))}"]
    if global_batch % world == 0:
        nearest = _nearest_divisors(global_batch // world, micro_batch)
        mends.append(f"a micro batch of {' or '.join(map(str, nearest))}")
    raise DeepSpeedConfigError(
        f"global batch {global_batch} is not a multiple of micro batch {micro_batch} × {world} rank(s) = "
        f"{at_once} ({global_batch} = {steps} × {at_once} + {rest}); use {', or '.join(mends)}"
    )


# ---------------------------------------------------------------------------------------------------------
# Parse
# ---------------------------------------------------------------------------------------------------------


class _Object(dict):
    """A JSON object that remembers the keys it was given twice, so that they can be named by path."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.twice = [key for key, _ in pairs if key in seen or seen.add(key)]


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


# ---------------------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------------------


def _schema() -> Schema:
    """The table with the sections that DeepSpeed's models describe put in their places."""
    schema = {key: dict(entry) if isinstance(entry, dict) else entry for key, entry in TABLE.items()}
    for dotted, target in MODELS.items():
        *parents, name = dotted.split(".")
        section = schema
        for parent in parents:
            section = section[parent]
        section[name] = _model_schema(_import(target))
    return schema


def _import(target: str) -> type:
    # Late, because importing DeepSpeed takes seconds, and `--help` or a bad recipe should not wait for it.
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _model_schema(model: type) -> Schema:
    schema: Schema = {}
    for name, field in model.model_fields.items():
        if (field.json_schema_extra or {}).get("deprecated"):
            continue
        nested = next((kind for kind in _kinds(field.annotation) if hasattr(kind, "model_fields")), None)
        schema[name] = _model_schema(nested) if nested else object
        if field.alias:
            schema[field.alias] = schema[name]
    return schema


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) or (annotation,)


def _check_keys(section: _Object, schema: Schema, root: Schema, path: tuple[str, ...]) -> None:
    if section.twice:
        raise DeepSpeedConfigError(f"{_dotted(path, section.twice[0])}: stands twice; keep one")
    for key, value in section.items():
        dotted = _dotted(path, key)
        if dotted in REFUSED:
            raise DeepSpeedConfigError(f"{dotted}: not supported: {REFUSED[dotted]}; remove it")
        if key not in schema:
            raise DeepSpeedConfigError(f"{dotted}: unknown key; {_mend(key, schema, root, path)}")
        expected = schema[key]
        if isinstance(expected, dict):
            if not isinstance(value, dict):
                raise DeepSpeedConfigError(f"{dotted}: must be a section, {{ … }}, not {json.dumps(value)}")
            _check_keys(value, expected, root, (*path, key))
        elif value != "auto":
            _check_type(dotted, value, expected)


def _check_type(dotted: str, value: Any, expected: type | tuple[type, ...] | frozenset[str]) -> None:
    if isinstance(value, dict):
        raise DeepSpeedConfigError(f"{dotted}: takes a value, not a section")
    if isinstance(expected, frozenset):
        if str(value).lower() not in expected:
            words = ", ".join(sorted(expected))
            raise DeepSpeedConfigError(f"{dotted}: must be one of {words}, not {json.dumps(value)}")
        return
    kinds = expected if isinstance(expected, tuple) else (expected,)
    if object in kinds:
        return
    # JSON's true is an int to Python, and 64.0 or 1e6 is a whole number to people.
    is_bool = isinstance(value, bool)
    whole = not is_bool and isinstance(value, float) and value.is_integer() and int in kinds
    if (is_bool and bool not in kinds) or not (isinstance(value, kinds) or whole):
        names = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "a string",
            list: "a list",
        }
        wanted = " or ".join(names.get(kind, "null") for kind in kinds if not (kind is int and float in kinds))
        raise DeepSpeedConfigError(f"{dotted}: must be {wanted}, not {json.dumps(value)}")


def _mend(key: str, schema: Schema, root: Schema, path: tuple[str, ...]) -> str:
    elsewhere = [where for where in _places(key, root) if where != _dotted(path, key)]
    if elsewhere:
        return f"it belongs at {elsewhere[0]}"
    close = difflib.get_close_matches(key, schema, n=1, cutoff=0.5)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"known here: {', '.join(sorted(schema))}" if len(schema) <= 12 else "remove it"


def _places(key: str, schema: Schema, path: tuple[str, ...] = ()) -> Iterator[str]:
    for name, entry in schema.items():
        if name == key:
            yield _dotted(path, name)
        if isinstance(entry, dict):
            yield from _places(key, entry, (*path, name))


def _dotted(path: tuple[str, ...], key: str) -> str:
    return ".".join((*path, key))


# ---------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------


def _decided(values: RecipeValues) -> dict[str, tuple[str, Any]]:
    """dotted key → (what decides it, its value)."""
    accumulation = check_batch(values.global_batch, values.micro_batch, values.world_size)
    params = "optimizer.params."
    return {
        "train_batch_size": ("the recipe's global_batch", values.global_batch),
        "train_micro_batch_size_per_gpu": ("the recipe's micro_batch", values.micro_batch),
        "gradient_accumulation_steps": ("the recipe's global_batch / (micro_batch × ranks)", accumulation),
        "gradient_clipping": ("the recipe's gradient_clipping", values.gradient_clipping),
        "bf16.enabled": ("bf16 on this device", values.bf16),
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
    _refuse_auto(config, ())
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


def _refuse_auto(section: dict[str, Any], path: tuple[str, ...]) -> None:
    for key, value in section.items():
        dotted = _dotted(path, key)
        if isinstance(value, dict):
            _refuse_auto(value, (*path, key))
        elif value == "auto" and dotted not in AUTO_IS_A_VALUE:
            raise DeepSpeedConfigError(f'{dotted}: nothing in the recipe fills this "auto"; write a value')


def _same(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(_same, given, wanted))
    if isinstance(wanted, bool) or not isinstance(given, Number):
        return given is wanted
    return math.isclose(given, wanted, rel_tol=1e-9)


def _check_values(config: dict[str, Any]) -> None:
    """Let DeepSpeed's models judge the values of their sections, and say it in one line."""
    from pydantic import ValidationError

    for dotted, target in MODELS.items():
        section: Any = config
        for name in dotted.split("."):
            section = section.get(name, {})
        try:
            _import(target)(**section)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join((dotted, *map(str, first["loc"])))
            raise DeepSpeedConfigError(f"{key}: {first['msg']}, not {json.dumps(first['input'])}") from None


def _check_together(config: dict[str, Any], world_size: int) -> None:
    zero = config.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))  # its model also takes "3"
    _check_optimizer(config.get("optimizer", {}))
    if _offloads(zero, "offload_param") and stage < 3:
        raise DeepSpeedConfigError(f"zero_optimization.offload_param: needs stage 3, and the stage is {stage}")
    for section in ("offload_param", "offload_optimizer"):
        if zero.get(section, {}).get("device") == "nvme":
            raise DeepSpeedConfigError(f'zero_optimization.{section}.device: "nvme" is not supported; write "cpu"')
    if _offloads(zero, "offload_optimizer"):
        if stage < 1:
            raise DeepSpeedConfigError("zero_optimization.offload_optimizer: needs stage 1, 2 or 3, not 0")
        if _torch_adam(config) and config.get("zero_force_ds_cpu_optimizer", True):
            raise DeepSpeedConfigError(
                "optimizer.params.torch_adam: with offload_optimizer, DeepSpeed wants its own AdamW; "
                'write false, or set "zero_force_ds_cpu_optimizer": false at the top level'
            )
    group = min(int(zero.get("zero_hpz_partition_size", 1)) or 1, world_size)
    if world_size % group:
        raise DeepSpeedConfigError(
            f"zero_optimization.zero_hpz_partition_size: {world_size} ranks do not divide into "
            f"groups of {group}; write the number of accelerators in one node"
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


def _offloads(zero: dict[str, Any], section: str) -> bool:
    return zero.get(section, {}).get("device", "none") != "none"


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    """The divisors of `number` next below and above `wanted`."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    below = [d for d in divisors if d < wanted][-1:]
    return below + [d for d in divisors if d > wanted][:1]
