"""Numbers that are none, or out of range: each numeric option of each command, and each key of the DeepSpeed JSON."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from train_commands import DEFAULTS
from train_commands import parse as parse_training

from mug.run.common.command_line import Parser
from mug.run.common.errors import user_errors
from mug.run.training import deepspeed_config
from mug.run.training.deepspeed_config import DeepSpeedConfigError, RecipeValues, load_deepspeed_config
from mug.run.training.deepspeed_schema import REFUSED, DeepSpeedJson
from mug.run.training.recipe import Named, build_parser

RUN = Path(__file__).parents[2] / "run"
OBJECTIVES = {command: recipe.parent.name for command, recipe in DEFAULTS.items()}  # of the commands that train
COMMANDS = {path.stem for path in RUN.glob("*.py") if "\n    run_command(main)\n" in path.read_text(encoding="utf-8")}
COMMANDS -= {*OBJECTIVES, "preflight"}  # which takes pretrain's parser
DEEPSPEED = ["--deepspeed", "ds_configs/zero3.json"]


def is_number(kind: Any) -> bool:
    """Whether a type is of numbers, or of collections of them."""
    return kind in (int, float) or any(is_number(inner) for inner in get_args(kind))


class Captured(Exception):
    pass


def parser_of(command: str, monkeypatch) -> Parser:
    """The parser that the command makes."""
    if command in OBJECTIVES:
        return build_parser(f"{command}.py", "", Named(OBJECTIVES[command]))

    def capture(self, *_, **__):
        raise Captured(self)

    with monkeypatch.context() as patched:
        patched.setattr(Parser, "parse_args", capture)
        with pytest.raises(Captured) as caught:
            importlib.import_module(f"mug.run.{command}").parse()
    return caught.value.args[0]


def parse(command: str, arguments: list[str], monkeypatch) -> Any:
    """What the command makes of its arguments, in front of its main."""
    if command in OBJECTIVES:
        return parse_training(command, [*DEEPSPEED, *arguments])
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    return importlib.import_module(f"mug.run.{command}").parse()


def numeric(parser: Parser) -> list[tuple[str, Any]]:
    """Name and type of each numeric option."""
    kinds = [(action.dest, getattr(action, "_typehint", None) or action.type) for action in parser._actions]
    return [(name, kind) for name, kind in kinds if is_number(kind) and name != "local_rank"]


def written(kind: Any, value: str) -> str:
    """A value as the command line takes it for this type."""
    if any(getattr(one, "__origin__", None) is dict or one is dict for one in (kind, *get_args(kind))):
        return f"{{pixels: {value}, caption: {value}, segments: {value}, auxiliary: {value}}}"
    if kind in (tuple[float, float],):
        return f"[{value}, {value}]"
    return value


REQUIRED = {"build_shards": ["fashion-mnist", "--out", "x"], "train_tokenizer": ["x", "--out", "x"]}
REQUIRED |= {"index_shards": ["x", "--out", "x"], "knn": ["x", "--data", "x"], "linear_probe": ["x", "--data", "x"]}
REQUIRED |= {"recipe_cost": ["run/recipes/unix2/base.yaml"]}
REQUIRED |= {"caption_eval": ["x"], "generate": ["x"], "evaluate": ["x", "--eval", "losses"]}
REQUIRED |= {
    "benchmark": ["run/studies/quick.yaml"],
    "bench_checkpoint": ["--deepspeed", "x"],
    "bench_step": ["--deepspeed", "x"],
}


@pytest.mark.parametrize("command", [*OBJECTIVES, *sorted(COMMANDS)])
def test_no_numeric_option_takes_what_is_none_or_out_of_range(command, monkeypatch):
    options = numeric(parser_of(command, monkeypatch))
    if command in OBJECTIVES:
        assert len(options) > 15, "the options are found"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with which a benchmark does not start
    first = REQUIRED.get(command, [])
    if options:
        parse(command, first, monkeypatch)  # else all that follows would be refused for something else
    for name, kind in options:
        for value in (".nan", ".inf", "-1"):
            try:
                parse(command, [*first, f"--{name}={written(kind, value)}"], monkeypatch)
            except user_errors() as error:
                last = name.rpartition(".")[2]
                assert last in str(error) or "text decoder" in str(error), (name, value, error)
                assert "\n" not in str(error)
            else:
                pytest.fail(f"{command} --{name} {value} is accepted")


def test_a_recipe_with_a_number_that_is_none_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    for section, values in {
        "trainer": {"weight_decay": float("nan"), "gradient_clipping": float("nan"), "epochs": float("inf")},
        "checkpoint": {"every_minutes": float("nan")},
        "loss_weights": {"pixels": float("nan")},
    }.items():
        for key, value in values.items():
            path.write_text(yaml.safe_dump({section: {key: value}}))
            with pytest.raises(user_errors(), match=rf"{section}\.{key} is (nan|inf); give a number"):
                parse_training("pretrain", [*DEEPSPEED, "--config", str(path)])


# --- The DeepSpeed JSON ------------------------------------------------------------------------------------

VALUES = {"global_batch": 8, "micro_batch": 2, "world_size": 1, "gradient_clipping": 1.0, "bf16": False}
VALUES |= {"learning_rate": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05}
# For which 0 says something: all of it, none of it, or leave it out.
ZERO_MAY = {"gradient_clipping", "optimizer.params.weight_decay", "zero_optimization.zero_hpz_partition_size"}
ZERO_MAY |= {"flops_profiler.recompute_fwd_factor", "flops_profiler.module_depth"}
ZERO_MAY |= {f"zero_optimization.{stage}module_granularity_threshold" for stage in ("", "stage3_")}
SIZES = ("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold")
SIZES += ("max_live_parameters", "max_reuse_distance")
ZERO_MAY |= {f"zero_optimization.{stage}{name}" for name in SIZES for stage in ("", "stage3_")}
ZERO_MAY |= {f"zero_optimization.offload_{part}.{name}" for part in ("param", "optimizer") for name in
             ("buffer_count", "buffer_size", "max_in_cpu", "cpuadam_cores_perc")}  # fmt: skip


def numeric_keys(model: type[BaseModel], path: str = "") -> list[str]:
    """The dotted keys to which a model, ours or DeepSpeed's, gives a number."""
    keys = []
    sections = deepspeed_config.fields_of(model)
    for name, field in model.model_fields.items():
        for key in (name, field.alias):
            if sections.get(key):
                keys += numeric_keys(sections[key], f"{path}{key}.")
            elif key in sections and is_number(field.annotation):
                keys.append(f"{path}{key}")
    return [key for key in keys if not any(key == one or key.startswith(f"{one}.") for one in REFUSED)]


def refusal(text: str, path: Path) -> str | None:
    path.write_text(text, encoding="utf-8")
    try:
        load_deepspeed_config(path, RecipeValues(**VALUES))
    except DeepSpeedConfigError as error:
        return str(error)
    return None


def with_key(dotted: str, value: str) -> str:
    """A JSON whose `dotted` key has the value, which need not be JSON."""
    config: dict[str, Any] = {"zero_optimization": {"stage": 0}, "optimizer": {"type": "AdamW", "params": {}}}
    *parents, key = dotted.split(".")
    section = config
    for parent in parents:
        section = section.setdefault(parent, {})
    section[key] = "HERE"
    return json.dumps(config).replace('"HERE"', value)


def test_no_numeric_key_of_the_deepspeed_json_takes_what_is_none_or_out_of_range(tmp_path):
    keys = numeric_keys(DeepSpeedJson)
    assert {"steps_per_print", "zero_optimization.stage3_max_live_parameters"} < set(keys) and len(keys) > 35
    for key in keys:
        for value in ("NaN", "Infinity", "-Infinity", "1e999", "-2", *([] if key in ZERO_MAY else ["0"])):
            said = refusal(with_key(key, value), tmp_path / "ds.json")
            assert said and key.rpartition(".")[2] in said and "\n" not in said, (key, value, said)


@pytest.mark.parametrize(
    ("zero", "top", "said"),
    [
        ({"stage": 2, "allgather_bucket_size": 5001}, {}, "allgather_bucket_size: stage 2 needs an even number"),
        ({"stage": 2}, {"prescale_gradients": True}, "stage 2 takes neither"),
        ({"stage": 3}, {"gradient_predivide_factor": 2.0}, "stage 3 takes neither"),
    ],
)
def test_what_stages_1_and_2_would_only_assert_is_reported(zero, top, said, tmp_path):
    config = {"zero_optimization": zero, "optimizer": {"type": "AdamW", "params": {}}} | top
    assert said in refusal(json.dumps(config), tmp_path / "ds.json")


@pytest.mark.parametrize("value", ["1e400", "-.inf", "1e100", "-1e300"])
def test_a_number_is_finite_and_below_a_bound(value):
    with pytest.raises(user_errors(), match=r"trainer\.epochs is .*; give a number, finite and below 1e\+100"):
        parse_training("pretrain", [*DEEPSPEED, f"--trainer.epochs={value}"])


def test_an_integer_is_below_a_bound_too():
    with pytest.raises(user_errors(), match=r"seed is 10{30}; give a number"):
        parse_training("pretrain", [*DEEPSPEED, f"--seed={10**30}"])
