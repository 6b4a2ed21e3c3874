"""Attention and caption head compile for sm_90 to tensor-core products and wide loads, and spill no registers."""

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
    assert len(kernels) == 10
    for kernel in kernels:
        assert kernel["spilled"] == 0 and kernel["shared"] <= SHARED // 2, kernel  # two programs on an SM at least
        assert kernel["tensor_core"] >= 6, kernel
        # Log-sum-exp and the starts of sequences are single numbers; all else moves in 16-byte pieces.
        assert kernel["loads"] - kernel["wide_loads"] <= 7 and kernel["wide_stores"] > 0, kernel


def test_linear_cross_entropy():
    (kernel,) = compiled("linear_cross_entropy")
    assert kernel["spilled"] == 0 and kernel["registers"] <= 128, kernel
    assert kernel["loads"] - kernel["wide_loads"] <= 2, kernel  # target and its logit
    assert kernel["wide_stores"] > 0, kernel
