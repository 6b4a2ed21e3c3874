"""The whole model's benchmark: its rows from the real script, its optimizer, and the groups of its profile."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mug.model.objectives.mug import MUGConfig, stage_flops
from mug.model.presets import resolve
from mug.run import bench_model
from mug.run.bench_model import fitting
from mug.run.benchmarks.kernel_timing import Ceilings
from mug.run.benchmarks.throughput import MixedAdamW, group_of
from mug.run.common.errors import RunError

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_rows_hold_speed_share_and_where_the_time_goes(tmp_path):
    file = tmp_path / "rows.jsonl"
    options = ("--preset", "tiny", "--batch", "16", "--steps", "2", "--device", "cpu", "--json", str(file))
    options += ("--activation_checkpointing", "elementwise")
    command = [sys.executable, "run/bench_model.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    machine, row = (json.loads(line) for line in file.read_text().splitlines())
    assert row["images_per_s"] == pytest.approx(16 / (row["step_ms"] / 1e3))
    # Captions fill half of the 24 tokens and one more.
    flops = sum(stage_flops(resolve(MUGConfig("tiny")), 30522, 13).values())
    assert row["mfu"] == pytest.approx(flops * row["images_per_s"] / (machine["matmul_tflops"] * 1e12))
    assert row["profile"]["matrix products"] == max(row["profile"].values())
    assert sum(row["profile"].values()) > 0.99
    assert "tiny, elementwise recomputed, batch 16: " in done.stdout
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
        ("backward_kernel", "attention"),
        ("_scale_kernel", "losses"),
        ("void at::native::indexing_backward_kernel<c10::BFloat16, 4>(long const*, long const*)", "gathers"),
        ("void at::native::(anonymous namespace)::indexing_backward_kernel_stride_1<float>", "gathers"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<at_cuda_detail::cub::Policy900>", "gathers"),
        ("void at::native::radixSortKVInPlace<-2, -1, 32, 4, long, long, unsigned int>", "gathers"),
        ("void cudnn::fusion::convert_dq_to_16bits<__nv_bfloat16, 64>", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64", "attention"),
    ],
)
def test_kernels_fall_into_the_groups_that_they_belong_to(kernel, group):
    assert group_of(kernel) == group


@pytest.mark.parametrize("gigabytes, base", [(24, 512), (85.0, 512), (150.7, 1024), (192, 1024)])
def test_batches_fit_the_memory_of_the_device(gigabytes, base):
    batches = fitting(1e9 * gigabytes)
    assert batches["base"] == base and batches["large"] == base // 2 and batches["huge"] == base // 4


def test_a_cpu_is_asked_for_seconds_a_step(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_model.py", "--device", "cpu"])
    assert bench_model.parse().preset == ["tiny"] and bench_model.suiting(torch.device("cpu"))["huge"] == 2


def test_a_batch_that_does_not_fit_is_halved_unless_it_was_named(monkeypatch):
    tried, said = [], []

    def measure(preset, batch, *_):
        tried.append(batch)
        if batch > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"kind": "throughput", "batch": batch}

    monkeypatch.setattr(bench_model, "measure_preset", measure)
    monkeypatch.setattr(bench_model, "measure_ceilings", lambda *_: Ceilings(1e9, 1e9))
    monkeypatch.setattr(bench_model, "describe", lambda row: f"done at {row['batch']}")
    monkeypatch.setattr(bench_model, "suiting", lambda device: fitting(85e9))
    console = SimpleNamespace(info=said.append)
    monkeypatch.setattr(sys, "argv", ["bench_model.py", "--device", "cpu", "--preset", "base"])
    bench_model.main(console)
    assert tried == [512, 256]
    assert said[1:] == [
        "batches: base 512",
        "base, batch 512: does not fit this GPU; trying 256",
        "done at 256",
    ]
    monkeypatch.setattr(sys, "argv", ["bench_model.py", "--device", "cpu", "--preset", "base", "--batch", "400"])
    with pytest.raises(RunError, match="--batch 400 of base does not fit this GPU; lower it"):
        bench_model.main(console)
