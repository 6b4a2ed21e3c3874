"""The commands that users type, and what they leave behind."""

import pytest
import torch
from launch import PYTHON, TOY, deepspeed, forks, losses, pretrain, rows, torchrun

STEPS = ("--trainer.max_steps", "3", *TOY)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [PYTHON, deepspeed(1), deepspeed(2), torchrun(2)],
    ids=["python", "deepspeed", "deepspeed 2 ranks", "torchrun 2 ranks"],
)
def test_trains_on_the_embedded_default(tmp_path, launcher):
    done = pretrain(tmp_path / "run", *STEPS, launcher=launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == [1, 2, 3]
    assert (tmp_path / "run" / "latest").read_text() == "checkpoint-3"
    assert (tmp_path / "run" / "samples" / "step-3.png").is_file()
    assert len(rows(tmp_path / "run", "eval")) == 1


@pytest.mark.slow
def test_zero_stages_and_ranks_give_the_same_losses(tmp_path):
    runs = {f"zero{stage}": (f"ds_configs/zero{stage}.json", forks(1)) for stage in range(4)}
    runs["zero3 on two ranks"] = ("ds_configs/zero3.json", forks(2))
    curves = {}
    for name, (config, launcher) in runs.items():
        done = pretrain(tmp_path / name, *TOY, "--trainer.max_steps", "20", config=config, launcher=launcher)
        assert done.returncode == 0, done.stdout + done.stderr
        curves[name] = losses(tmp_path / name) + losses(tmp_path / name, "eval")
        assert len(curves[name]) == 21
        for row in curves[name]:
            row.pop("grad_norm", None)  # DeepSpeed has none under stage 0 in fp32
    for name, curve in curves.items():
        for mine, other in zip(curve, curves["zero0"], strict=True):
            assert mine == pytest.approx(other, abs=1e-4), f"{name}, step {mine['step']}"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernel runs anyway")
def test_zero3_trains_on_the_triton_kernel_as_on_the_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    curves = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("MUG_MASKED_PATCH_LOSS_BACKEND", backend)
        done = pretrain(tmp_path / backend, *STEPS, launcher=deepspeed(1))
        assert done.returncode == 0, done.stdout + done.stderr
        curves[backend] = losses(tmp_path / backend) + losses(tmp_path / backend, "eval")
    assert curves["triton"] != curves["reference"]  # to the last bit: it did run
    for mine, other in zip(curves["triton"], curves["reference"], strict=True):
        assert mine == pytest.approx(other, abs=1e-5)


@pytest.mark.slow
def test_zero3_loses_nothing_by_computing_again_in_backward(tmp_path):
    curves = {}
    for policy in ("none", "elementwise", "blocks"):
        done = pretrain(tmp_path / policy, *STEPS, "--trainer.activation_checkpointing", policy)
        assert done.returncode == 0, done.stdout + done.stderr
        curves[policy] = losses(tmp_path / policy)
    assert curves["elementwise"] == curves["blocks"] == curves["none"]


@pytest.mark.slow
@pytest.mark.parametrize(("left_out", "weights"), [("caption", (1, 0)), ("pixels", (0, 1))])
def test_a_loss_of_weight_0_is_not_computed_under_any_zero_stage(tmp_path, left_out, weights):
    options = ("--loss_weights.pixels", str(weights[0]), "--loss_weights.caption", str(weights[1]), *STEPS)
    curves = {}
    for config, launcher in (("zero0", forks(1)), ("zero1", forks(2)), ("zero3", forks(2))):
        done = pretrain(tmp_path / config, *options, config=f"ds_configs/{config}.json", launcher=launcher)
        assert done.returncode == 0, done.stdout + done.stderr
        curves[config] = losses(tmp_path / config) + losses(tmp_path / config, "eval")
        for row in curves[config]:
            row.pop("grad_norm", None)  # DeepSpeed has none under stage 0 in fp32
            assert f"loss/{left_out}" not in row and len([name for name in row if name.startswith("loss/")]) == 2
    for name, curve in curves.items():
        for mine, other in zip(curve, curves["zero0"], strict=True):
            assert mine == pytest.approx(other, abs=1e-4), f"{name}, step {mine['step']}"
