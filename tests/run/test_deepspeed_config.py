"""The strict reader of DeepSpeed JSONs: what it refuses, what it fills, and that the shipped files pass."""

import json
import re
from pathlib import Path

import pytest

from mug.run.training.deepspeed_config import DeepSpeedConfigError, RecipeValues, check_batch, load_deepspeed_config

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def recipe(**changes) -> RecipeValues:
    values = {
        "global_batch": 256,
        "micro_batch": 8,
        "world_size": 4,
        "gradient_clipping": 1.0,
        "bf16": True,
        "learning_rate": 1.5e-4,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.05,
    }
    return RecipeValues(**(values | changes))


def minimal() -> dict:
    return {
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    }


@pytest.fixture
def load(tmp_path):
    """Write a configuration (a dict, or raw text), read it back strictly."""

    def write_and_load(config: dict | str, values: RecipeValues | None = None) -> dict:
        path = tmp_path / "ds.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return load_deepspeed_config(path, values or recipe())

    return write_and_load


def with_key(dotted: str, value) -> dict:
    """The minimal configuration with one key, written as a dotted path, set."""
    config = minimal()
    *parents, key = dotted.split(".")
    section = config
    for parent in parents:
        section = section.setdefault(parent, {})
    section[key] = value
    return config


# -- the shipped files ------------------------------------------------------------------------------------


def test_all_shipped_files_are_found():
    names = {path.stem for path in SHIPPED}
    assert names == {"zero0", "zero1", "zero2", "zero3", "zero3_offload", "zero3_multinode"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_shipped_file_loads_and_is_left_alone(path, bf16):
    before = path.read_bytes()
    config = load_deepspeed_config(path, recipe(world_size=16, global_batch=512, bf16=bf16))
    assert '"auto"' not in json.dumps(config)
    assert config["train_batch_size"] == 512
    assert config["bf16"]["enabled"] is bf16
    assert path.read_bytes() == before


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_deepspeed_itself_accepts_the_shipped_file(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load_deepspeed_config(path, recipe(world_size=1, global_batch=32))
    read = DeepSpeedConfig(config)
    assert (read.train_batch_size, read.gradient_accumulation_steps) == (32, 4)
    assert read.zero_optimization_stage == int(re.search(r"\d", path.stem)[0])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_gradients_accumulate_in_fp32(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load_deepspeed_config(path, recipe(world_size=1, global_batch=32, bf16=True))
    accumulated = DeepSpeedConfig(config).grad_accum_dtype
    assert accumulated == (None if path.stem == "zero0" else "fp32"), "DeepSpeed's stage 0 knows no such choice"


@pytest.mark.parametrize(("bf16", "dtype"), [(True, "fp32"), (False, "bf16")])
def test_stage_0_accumulates_in_the_models_precision(load, bf16, dtype):
    config = with_key("data_types.grad_accum_dtype", dtype)
    load(config, recipe(bf16=bf16))
    config["zero_optimization"]["stage"] = 0
    with pytest.raises(DeepSpeedConfigError, match=rf'grad_accum_dtype: stage 0 .* not {dtype}; .*"stage": 1'):
        load(config, recipe(bf16=bf16))


# -- filling ----------------------------------------------------------------------------------------------


def test_auto_is_filled_by_value(load):
    config = with_key("gradient_clipping", "auto")
    config["train_batch_size"] = "auto"
    config["optimizer"]["params"] |= {"betas": "auto", "eps": "auto", "weight_decay": "auto"}
    config["zero_optimization"] |= {
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    }
    filled = load(config, recipe(gradient_clipping=0.5, width=192))
    assert filled["train_batch_size"] == 256
    assert filled["train_micro_batch_size_per_gpu"] == 8
    assert filled["gradient_accumulation_steps"] == 8
    assert filled["gradient_clipping"] == 0.5
    assert filled["bf16"] == {"enabled": True}
    assert filled["optimizer"]["params"] == {
        "lr": 1.5e-4,
        "torch_adam": True,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.05,
    }
    zero = filled["zero_optimization"]
    assert zero["reduce_bucket_size"] == 192 * 192
    assert zero["stage3_prefetch_bucket_size"] == 33177
    assert zero["stage3_param_persistence_threshold"] == 1920


def test_keys_left_out_are_filled_like_auto(load):
    """DeepSpeed's own defaults (clipping 1.0, fp32) must not overrule the recipe."""
    filled = load(minimal(), recipe(gradient_clipping=0.0))
    assert filled["gradient_clipping"] == 0.0
    assert filled["bf16"]["enabled"] is True
    assert filled["optimizer"]["params"]["weight_decay"] == 0.05


@pytest.mark.parametrize(
    "dotted",
    ["zero_optimization.reduce_bucket_size", "zero_optimization.sub_group_size", "steps_per_print"],
)
def test_auto_without_a_value_is_refused(load, dotted):
    with pytest.raises(DeepSpeedConfigError, match=rf"ds\.json: {re.escape(dotted)}: .*auto"):
        load(with_key(dotted, "auto"))


@pytest.mark.parametrize(
    ("dotted", "agrees", "contradicts", "name"),
    [
        ("train_batch_size", 256, 128, "the recipe's global_batch"),
        ("train_micro_batch_size_per_gpu", 8, 16, "the recipe's micro_batch"),
        ("gradient_accumulation_steps", 8, 1, "the recipe's global_batch / (micro_batch × ranks)"),
        ("gradient_clipping", 1, 0.5, "the recipe's gradient_clipping"),
        ("bf16.enabled", True, False, "the recipe's trainer.precision (bf16)"),
        ("optimizer.params.lr", 0.00015, 1e-3, "the recipe's learning_rate"),
        ("optimizer.params.betas", [0.9, 0.95], [0.9, 0.999], "the recipe's betas"),
        ("optimizer.params.eps", 1e-8, 1e-6, "the trainer's eps"),
        ("optimizer.params.weight_decay", 0.05, 0.01, "the recipe's weight_decay"),
    ],
)
def test_a_concrete_value_must_agree_with_the_recipe(load, dotted, agrees, contradicts, name):
    load(with_key(dotted, agrees))
    with pytest.raises(DeepSpeedConfigError) as caught:
        load(with_key(dotted, contradicts))
    message = str(caught.value)
    assert f"{dotted} is {json.dumps(contradicts)}, but {name} is" in message


# -- refusing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dotted", "fix"),
    [
        ("gradient_cliping", '"gradient_clipping"'),
        ("overlap_comm", "zero_optimization.overlap_comm"),
        ("zero_optimization.overlap_com", '"overlap_comm"'),
        ("zero_optimization.stage3_prefetch_bucket", '"stage3_prefetch_bucket_size"'),
        ("zero_optimization.offload_optimizer.devise", '"device"'),
        ("zero_optimization.offload_param.pin_mem", '"pin_memory"'),
        ("zero_optimization.leaf_module.klasses", '"classes"'),
        ("optimizer.parms", '"params"'),
        ("optimizer.params.beta", '"betas"'),
        ("bf16.enable", '"enabled"'),
        ("timers.throughput.sync", '"synchronized"'),
    ],
)
def test_unknown_key_is_refused_by_path_with_a_fix(load, dotted, fix):
    with pytest.raises(DeepSpeedConfigError) as caught:
        load(with_key(dotted, 1))
    message = str(caught.value)
    assert f"ds.json: {dotted}: unknown key" in message and fix in message and "\n" not in message


@pytest.mark.parametrize(
    "dotted",
    [
        "scheduler",
        "fp16.enabled",
        "torch_autocast",
        "elasticity",
        "curriculum_learning",
        "pipeline",
        "activation_checkpointing",
        "comet.api_key",
        "zero_optimization.mics_shard_size",
        "optimizer.params.max_grad_norm",
    ],
)
def test_what_the_trainer_cannot_honour_is_refused_with_a_reason(load, dotted):
    with pytest.raises(DeepSpeedConfigError, match=r"not supported: .+; remove it"):
        load(with_key(dotted, 1))


@pytest.mark.parametrize(
    ("dotted", "value", "says"),
    [
        ("steps_per_print", "often", "must be a whole number"),
        ("train_batch_size", 2.5, "must be a whole number"),
        ("gradient_accumulation_steps", True, "must be a whole number"),
        ("wall_clock_breakdown", 1, "must be true or false"),
        ("optimizer.params.betas", 0.9, "must be a list"),
        ("optimizer.params.betas", ["0.9", 0.95], "the recipe's betas"),
        ("zero_optimization", True, "must be a section"),
        ("steps_per_print", {}, "takes a value"),
        ("zero_optimization.stage", 4, "must be 0, 1, 2"),
        ("log_level", "loud", "must be 'critical', 'debug'"),
        ("communication_data_type", "int8", "must be 'bf16', 'fp16' or 'fp32'"),
        ("zero_optimization.reduce_bucket_size", -1, "greater than 0"),
        ("zero_optimization.offload_optimizer.device", "gpu", "'cpu'"),
        ("optimizer.type", "Lamb", 'write "AdamW"'),
        ("zero_optimization.offload_optimizer.device", "cpu", "zero_force_ds_cpu_optimizer"),
        ("zero_optimization.zero_hpz_partition_size", 3, "groups of 3"),
        ("optimizer.params.bias_correction", True, '"torch_adam": false'),
    ],
)
def test_wrong_value_is_refused_by_path(load, dotted, value, says):
    with pytest.raises(DeepSpeedConfigError) as caught:
        load(with_key(dotted, value))
    message = str(caught.value)
    assert says in message and "\n" not in message


def test_combinations_that_deepspeed_would_ignore_are_refused(load):
    config = with_key("zero_optimization.offload_param.device", "cpu")
    config["zero_optimization"]["stage"] = 2
    with pytest.raises(DeepSpeedConfigError, match="offload_param: needs stage 3"):
        load(config)
    config = with_key("optimizer.params.fused", True)
    config["optimizer"]["params"]["torch_adam"] = False
    with pytest.raises(DeepSpeedConfigError, match=r'optimizer\.params\.fused: .*"torch_adam": true'):
        load(config)


def test_missing_optimizer_is_refused(load):
    with pytest.raises(DeepSpeedConfigError, match=r"optimizer\.type: missing"):
        load({"zero_optimization": {"stage": 3}})


def test_duplicate_key_is_refused_by_path(load):
    with pytest.raises(DeepSpeedConfigError, match=r"zero_optimization\.stage: appears twice"):
        load('{"zero_optimization": {"stage": 2, "stage": 3}}')
    with pytest.raises(DeepSpeedConfigError, match="bf16: appears twice"):
        load('{"bf16": {"enabled": true}, "bf16": {}}')


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "zero3.json").write_text("{}")
    with pytest.raises(DeepSpeedConfigError, match=r"zero33\.json: no such file; did you mean .*zero3\.json"):
        load_deepspeed_config(tmp_path / "zero33.json", recipe())


def test_bad_json_names_the_line(load):
    with pytest.raises(DeepSpeedConfigError, match="not valid JSON at line 2, column"):
        load('{"bf16":\n  {"enabled": true,}}')
    with pytest.raises(DeepSpeedConfigError, match="one JSON object"):
        load("[1, 2]")
    with pytest.raises(DeepSpeedConfigError, match="NaN"):
        load('{"gradient_clipping": NaN}')


# -- batch arithmetic -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world", "steps"),
    [(64, 64, 1, 1), (4096, 64, 8, 8), (6, 1, 3, 2), (1, 1, 1, 1)],
)
def test_accumulation_steps(global_batch, micro_batch, world, steps):
    assert check_batch(global_batch, micro_batch, world) == steps


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((100, 8, 3), "100 = 4 × 24 + 4); use a global batch of 96 or 120"),
        ((96, 10, 3), "use a global batch of 90 or 120, or a micro batch of 8 or 16"),
        ((4, 8, 1), "use a global batch of 8, or a micro batch of 4"),
        ((0, 8, 1), "global batch is 0; it must be at least 1"),
        ((8, 8, -1), "world size is -1"),
    ],
)
def test_batch_that_does_not_divide(arguments, says):
    with pytest.raises(DeepSpeedConfigError) as caught:
        check_batch(*arguments)
    assert says in str(caught.value)


def test_batch_that_does_not_divide_is_refused_on_loading(load):
    with pytest.raises(DeepSpeedConfigError, match="256 is not a multiple of micro batch 24 × 4"):
        load(minimal(), recipe(micro_batch=24))
