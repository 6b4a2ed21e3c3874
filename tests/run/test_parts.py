"""Parts of a model that are frozen, or have a learning rate of their own."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_gloo_ranks
from test_curves import batch_at, make, weights_of

from mug.run.common.errors import RunError
from mug.run.training.groups import freeze, parameter_groups
from mug.run.training.recipe import TrainerConfig, parse_command
from mug.run.training.step import train_step


def test_the_innermost_part_decides_the_rate_and_what_is_frozen_does_not_decay():
    model = make("clip")
    rates = {"encoder": 0.0, "encoder.blocks.1": 0.5, "text_projection": 0.1}
    groups = parameter_groups(model, TrainerConfig(weight_decay=0.3, layer_decay=0.5), rates)
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    found = {name: found[id(p)] for name, p in model.named_parameters()}
    assert found["encoder.cls_token"] == found["encoder.blocks.0.attn.qkv.weight"] == (0, 0)
    assert found["encoder.blocks.1.attn.qkv.weight"] == (0.25, 0.3)
    assert found["encoder.blocks.1.attn.qkv.bias"] == (0.25, 0)
    assert found["text_projection.weight"] == (0.1, 0.3) and found["image_projection.weight"] == (1, 0.3)


def gradients(name: str, rates: dict[str, float]) -> dict[str, torch.Tensor | None]:
    model = make(name)
    freeze(model, rates)
    losses, _ = model(batch_at(range(16)))
    sum(losses.values()).backward()
    return {of: parameter.grad for of, parameter in model.named_parameters()}


@pytest.mark.parametrize(("name", "part", "runs"), [("clip", "encoder", False), ("mug", "text_decoder", True)])
def test_what_is_frozen_adds_nothing_to_the_norm_and_the_rest_learns_as_before(name, part, runs):
    expected, found = gradients(name, {}), gradients(name, {part: 0.0})
    for of, gradient in found.items():
        if not of.startswith(f"{part}."):
            assert torch.equal(gradient, expected[of]), of
        elif runs:  # the image behind it still learns
            assert not gradient.any() and expected[of].any(), of
        else:
            assert gradient is None, "its backward pass need not run"


def test_a_part_that_holds_one_that_learns_runs_backward():
    found = gradients("clip", {"encoder": 0.0, "encoder.blocks.0": 1.0})
    assert found["encoder.blocks.0.mlp.fc1.weight"].any() and not found["encoder.blocks.1.mlp.fc1.weight"].any()


def assert_only_the_rest_moves(stage: int) -> None:
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False)
    for name, frozen in {"clip": "encoder", "coca": "text_decoder"}.items():
        model, rates = make(name), {frozen: 0.0, "image_projection": 0.1}
        freeze(model, rates)
        if stage == 3:
            set_z3_leaf_modules(model, list(model.zero3_leaves))
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        }
        groups = parameter_groups(model, TrainerConfig(weight_decay=0.5), rates)
        engine = deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]
        before = weights_of(engine)
        for step in range(2):
            for group in engine.optimizer.param_groups:
                group["lr"] = 1e-2 * group["lr_scale"]
            first = 16 * step + 8 * dist.get_rank()
            train_step(engine, [batch_at(range(i, i + 4)) for i in (first, first + 4)], model.losses)
        for of, weight in weights_of(engine).items():
            moved = (weight - before[of]).abs()
            if of.startswith(f"{frozen}."):
                assert torch.equal(weight, before[of]), of
            elif of == "image_projection.weight":  # AdamW's first steps are as long as the rate
                assert 1e-4 < moved.max() < 3e-3, of
            else:
                assert moved.max() > 5e-3, of
    dist.barrier()


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_frozen_parts_stay_as_they_are_to_the_bit_and_all_others_move(stage):
    run_gloo_ranks(2, assert_only_the_rest_moves, stage)


def test_parts_are_named_in_a_recipe_or_by_their_dotted_names(tmp_path):
    recipe = tmp_path / "lit.yaml"
    recipe.write_text("objective: clip\nrates: {encoder: 0}\ninit: {encoder: a, text_encoder: b}\n", encoding="utf-8")
    options = ["--config", str(recipe), "--deepspeed", "x.json"]
    found = parse_command("pretrain.py", "", recipe, options).recipe
    assert found.rates == {"encoder": 0} and found.init == {"encoder": "a", "text_encoder": "b"}
    found = parse_command("pretrain.py", "", recipe, [*options, "--rates.text_encoder", "0.1", "--init", "c"]).recipe
    assert found.rates == {"encoder": 0, "text_encoder": 0.1} and found.init == "c"
    with pytest.raises(RunError, match=r"rates\.encoder must be at least 0, not -1"):
        parse_command("pretrain.py", "", recipe, [*options, "--rates.encoder", "-1"])


def test_a_part_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(RunError) as refused:
        freeze(make("clip"), {"text_tower": 0.0})
    assert str(refused.value) == (
        "rates.text_tower: the model has no part of this name; it has encoder, text_encoder, image_projection,"
        " text_projection, scale, and their submodules"
    )
