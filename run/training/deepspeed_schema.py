"""The keys that a DeepSpeed JSON may hold, as pydantic models, and why the trainer refuses some others.

Where DeepSpeed has a model of a section, it is used as it is, so keys and bounds follow DeepSpeed. DeepSpeed reads the
other keys one by one; they are listed here. Import this module late: it imports DeepSpeed, which takes seconds.
"""

from typing import Annotated, Any, Literal

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, StrictBool, StrictStr, model_validator


def _whole(value: Any) -> Any:
    """Returns a float without a fraction as an int: people write 64.0 and 1e6 for whole numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Whole = Annotated[int, Strict(), BeforeValidator(_whole)]  # strict: to Python, JSON's true is an int
Positive = Annotated[Whole, Field(ge=1)]
Number = Annotated[float, Strict()]
Dtype = Annotated[Literal["bf16", "fp16", "fp32"], BeforeValidator(_lower)]
Level = Annotated[Literal["critical", "debug", "error", "info", "warning"], BeforeValidator(_lower)]
TagCheck = Annotated[Literal["fail", "ignore", "warn"], BeforeValidator(_lower)]


class Section(BaseModel):
    """A JSON object. Its "auto" values are not validated: the recipe fills them, or the loader refuses them."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def without_auto(cls, section: Any) -> Any:
        """Accept fields by name, as DeepSpeed's own models do."""
        return {k: v for k, v in section.items() if v != "auto"} if isinstance(section, dict) else section


class OptimizerParams(Section):
    lr: Number = None
    betas: list = None
    eps: Number = None
    weight_decay: Number = None
    torch_adam: StrictBool = None
    fused: StrictBool = None
    foreach: StrictBool = None
    bias_correction: StrictBool = None
    fp32_optimizer_states: StrictBool = None


class Optimizer(Section):
    type: StrictStr = None
    params: OptimizerParams = None


class DataTypes(Section):
    grad_accum_dtype: Dtype = None
    keep_in_fp32_modules: StrictStr | list = None


class ParallelWrite(Section):
    pipeline_stage: StrictBool = None


class CheckpointOptions(Section):
    tag_validation: TagCheck = None
    parallel_write: ParallelWrite = None
    checkpoint_serialization: StrictBool = None


class FlopsProfiler(Section):
    enabled: StrictBool = None
    recompute_fwd_factor: Annotated[Number, Field(ge=0)] = None
    profile_step: Positive = None
    module_depth: Annotated[Whole, Field(ge=-1)] = None  # -1: down to the leaves
    top_modules: Positive = None
    detailed: StrictBool = None
    output_file: StrictStr | None = None


class Aio(Section):
    block_size: Positive = None
    queue_depth: Positive = None
    intra_op_parallelism: Positive = None
    single_submit: StrictBool = None
    overlap_events: StrictBool = None
    use_gds: StrictBool = None


class Timers(Section):
    throughput: DeepSpeedThroughputTimerConfig = None


class DeepSpeedJson(Section):
    train_batch_size: Whole = None
    train_micro_batch_size_per_gpu: Whole = None
    gradient_accumulation_steps: Whole = None
    gradient_clipping: Number = None
    gradient_predivide_factor: Annotated[Number, Field(gt=0)] = None
    prescale_gradients: StrictBool = None
    communication_data_type: Dtype = None
    steps_per_print: Positive | None = None
    wall_clock_breakdown: StrictBool = None
    memory_breakdown: StrictBool = None
    dump_state: StrictBool = None
    disable_python_gc: StrictBool = None
    log_level: Level = None
    zero_allow_untested_optimizer: StrictBool = None
    zero_force_ds_cpu_optimizer: StrictBool = None
    optimizer: Optimizer = None
    data_types: DataTypes = None
    checkpoint: CheckpointOptions = None
    flops_profiler: FlopsProfiler = None
    aio: Aio = None
    timers: Timers = None
    zero_optimization: DeepSpeedZeroConfig = None
    bf16: DeepSpeedBF16Config = None
    comms_logger: CommsLoggerConfig = None
    tensorboard: TensorBoardConfig = None
    wandb: WandbConfig = None
    csv_monitor: CSVConfig = None
    comet: CometConfig = None


# Lower bounds of numbers for which DeepSpeed's models have none, or one that fails, or does nothing, later.
MIN = {
    "comet.samples_log_interval": 1,
    "zero_optimization.allgather_bucket_size": 1,
    "zero_optimization.sub_group_size": 1,
    "zero_optimization.module_granularity_threshold": 0,
    "zero_optimization.stage3_module_granularity_threshold": 0,
}

_OWN_LOADER = "batches come from the project's own loader, which DeepSpeed does not drive"
_DATA_PARALLEL = "the trainer is data-parallel (ZeRO) only"
_OWN_CHECKPOINTS = "checkpoints are the trainer's own, which any number of ranks can read"
_SECOND = "checkpoints do not hold the state of a second optimizer"
_PRECISION = "the precision is the recipe's trainer.precision: bf16 or fp32"
_REMOVED = "DeepSpeed has removed it"

# Keys that DeepSpeed knows, or knew, and this trainer cannot honour. Any other key is refused as unknown.
REFUSED = {
    "scheduler": "the trainer sets the learning rate itself; use the recipe's schedule",
    "fp16": _PRECISION,
    "bfloat16": 'this is the old name; use "bf16"',
    "amp": _REMOVED + '; use "bf16"',
    "torch_autocast": _PRECISION,
    "data_types.param_dtype": _PRECISION,
    "data_types.buffer_dtype": _PRECISION,
    "gradient_allreduce_op": "gradients are averaged over ranks; the recipe's learning rate depends on it",
    "activation_checkpointing": "the model's blocks do not call it; use trainer.activation_checkpointing",
    "checkpoint.load_universal": _OWN_CHECKPOINTS,
    "checkpoint.use_node_local_storage": _OWN_CHECKPOINTS,
    "checkpoint.writer": _OWN_CHECKPOINTS,
    "bf16.check_grad_overflow": "a step whose gradient is not finite is never taken",
    "zero_optimization.compute_grad_norm": "a gradient that is not finite shows in the norm",
    "compile": "DeepSpeed would compile its own hooks, too; use the recipe's trainer.compile",
    "data_efficiency": _OWN_LOADER,
    "curriculum_learning": _OWN_LOADER,
    "pipeline": _DATA_PARALLEL,
    "tensor_parallel": _DATA_PARALLEL,
    "sequence_parallel_size": _DATA_PARALLEL,
    "autotuning": "the batch sizes belong to the recipe",
    "elasticity": "the batch sizes belong to the recipe",
    "comet.api_key": "a secret does not belong in a configuration; set COMET_API_KEY",
    "optimizer.params.max_grad_norm": 'use "gradient_clipping" at the top level',
    "optimizer.params.adam_w_mode": 'it does nothing for type "AdamW"',
    "optimizer.params.amsgrad": "checkpoints hold AdamW's two moments, not a third",
    "zero_optimization.offload_optimizer.ratio": _SECOND,
    "zero_optimization.offload_optimizer.super_offload": _SECOND,
    "zero_optimization.zenflow": "it needs its own optimizer schedule, which the trainer does not drive",
    "zero_optimization.legacy_stage1": _REMOVED,
    "zero_optimization.elastic_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.pipeline_loading_checkpoint": _DATA_PARALLEL,
    "zero_optimization.save_muon_momentum_buffer_in_memory": 'the optimizer is "AdamW"',
    "zero_optimization.mics_shard_size": _REMOVED + '; use "zero_hpz_partition_size"',
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED + '; use "zero_hpz_partition_size"',
}
