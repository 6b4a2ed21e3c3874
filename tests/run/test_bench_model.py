"""The whole model's benchmark: its rows from the real script, its optimizer, and the groups of its profile."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mug.model.flops import flops_per_sample
from mug.model.presets import ModelConfig, resolve
from mug.run.benchmarks.throughput import MixedAdamW, group_of

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_rows_hold_speed_share_and_where_the_time_goes(tmp_path):
    file = tmp_path / "rows.jsonl"
    options = ("--preset", "tiny", "--batch", "4", "--steps", "2", "--device", "cpu", "--json", str(file))
    options += ("--recompute", "elementwise")
    command = [sys.executable, "run/bench_model.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    machine, row = (json.loads(line) for line in file.read_text().splitlines())
    assert row["images_per_s"] == pytest.approx(4 / (row["step_ms"] / 1e3))
    # Captions fill half of the 24 tokens and one more.
    flops = sum(flops_per_sample(resolve(ModelConfig("tiny")), 30522, 13).values())
    assert row["mfu"] == pytest.approx(flops * row["images_per_s"] / (machine["matmul_tflops"] * 1e12))
    assert row["profile"]["matrix products"] == max(row["profile"].values())
    assert sum(row["profile"].values()) > 0.99
    assert "tiny, elementwise recomputed, batch 4: " in done.stdout
    assert f"{row['images_per_s']:.0f} images/s, MFU {100 * row['mfu']:.1f}%" in done.stdout


def test_a_mistake_ends_with_one_line():
    command = [sys.executable, "run/bench_model.py", "--preset", "giant"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: --preset giant is not one of tiny, small, base, large, huge\n"


def test_bf16_weights_step_as_their_fp32_copies_do():
    torch.manual_seed(0)
    start = torch.randn(6, 5).bfloat16()
    gradients = [torch.randn(6, 5).bfloat16() for _ in range(3)]
    weight, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    ours = MixedAdamW([weight])
    adamw = torch.optim.AdamW([exact], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    for gradient in gradients:
        weight.grad, exact.grad = gradient.clone(), gradient.float()
        torch.nn.utils.clip_grad_norm_([exact], 1.0)
        ours.step()
        adamw.step()
        assert weight.grad is None
    assert torch.equal(weight, exact.bfloat16()) and not torch.equal(weight, start)
    torch.testing.assert_close(ours.copies[0], exact.detach(), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    "kernel, group",
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("dkdv_kernel", "attention"),
        ("_loss_kernel", "losses"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>", "norms"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "activations"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "element-wise"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("aten::addmm", "matrix products"),
        ("ncclDevKernel", "other"),
    ],
)
def test_kernels_fall_into_the_groups_that_they_belong_to(kernel, group):
    assert group_of(kernel) == group
