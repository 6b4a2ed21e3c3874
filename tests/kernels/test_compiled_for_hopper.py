"""The kernels compile for sm_90 to tensor-core products, wide loads and short loops, and spill no registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mug.kernels.linear_cross_entropy import HAS_TRITON

SHARED = 227 * 1024  # bytes that one program may have on sm_90


def compiled(*arguments: str) -> list[dict]:
    if not HAS_TRITON or torch.version.cuda is None:
        pytest.skip("needs Triton with its CUDA back end")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("hopper.py")), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("D", [32, 64, 80, 88, 128])
def test_attention(D):
    kernels = compiled("attention", str(D))
    assert len(kernels) == 14
    for kernel in kernels:
        programs = 1 if kernel["kernel"].endswith("128 rows") else 2  # on an SM, at least
        assert kernel["spilled"] == 0 and kernel["shared"] <= SHARED // programs, kernel
        assert kernel["tensor_core"] >= 6, kernel
        # Log-sum-exp and the starts of sequences are single numbers; all else moves in 16-byte pieces.
        assert kernel["loads"] - kernel["wide_loads"] <= 7 and kernel["wide_stores"] > 0, kernel


@pytest.mark.slow
def test_linear_cross_entropy():
    (kernel,) = compiled("linear_cross_entropy")
    assert kernel["spilled"] == 0 and kernel["registers"] <= 128, kernel
    assert kernel["loads"] - kernel["wide_loads"] <= 2, kernel  # target and its logit
    assert kernel["wide_stores"] > 0, kernel


@pytest.mark.slow
def test_masked_patch_loss():
    kernels = compiled("masked_patch_loss")
    assert all(kernel["spilled"] == 0 for kernel in kernels), kernels
    losses = [kernel for kernel in kernels if kernel["kernel"].startswith("patch")]
    assert len(losses) == 12 and len(kernels) == 24
    for kernel in losses:
        _, patch, prediction, image = kernel["kernel"].split()
        # A turn of the loop is one patch, or four of 8 px; programs are started for 128 registers.
        assert 0 < kernel["loop"] <= 700 and kernel["registers"] <= 128 and kernel["shuffles"] < 40, kernel
        # This prediction, the next one and the gradient; in half precision rows of patch 14 begin on 8 bytes.
        pieces = "wide_in_pairs" if patch == "14" and prediction != "fp32" else "wide_loads"
        assert kernel[pieces] >= 6, kernel
        if image == "u8" and patch != "14":
            assert kernel["loads"] < 30, kernel  # words: pixel by pixel it would be 24 more than for the rest
    assert all(kernel["wide_stores"] >= 8 for kernel in kernels if kernel["kernel"].startswith("scale"))
