"""The kernels compile for a GPU that need not be there (sm_90), and the machine code is as wide as it should be."""

import os
import subprocess
import sys

import pytest
import torch

from mug.kernels.masked_patch_loss import HAS_TRITON

PROGRAM = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mug.kernels import masked_patch_loss_triton as kernels

def compile(kernel, pointers, floats, **constants):
    signature = {}
    for name in kernel.arg_names:
        kind = "constexpr" if name in constants else "fp32" if name in floats else "i32"
        signature[name] = "*" + pointers[name] if name in pointers else kind
    aligned = [n for n in kernel.arg_names if n in pointers or n in ("W", "plane", "size")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    warps = max(1, constants["BLOCK"] // 1024) if "PATCH" in constants else 4
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]

patch, prediction, image, ragged = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "ragged"
floats = [f"{n}_{c}" for n in ("mean", "inverse_std") for c in range(3)] + ["eps", "inverse_total", "gradient_factor"]
pointers = dict(image=image, prediction=prediction, masked="i64", counts="i64", loss="fp32", gradient=prediction)
if ragged:
    pointers.update(counts="i32", inverse_total="fp32", gradient_factor="fp32")
block = triton.next_power_of_2(3 * patch**2)
constants = dict(PATCH=patch, ROWS=max(1, 1024 // block), BLOCK=block)
flags = dict(RAGGED=ragged, NORMALIZE=True, GRADIENT=True)
ptx = compile(kernels._loss_kernel, pointers, floats, **constants, **flags)
ptx += compile(kernels._scale_kernel, dict(gradient=prediction, scale="fp32"), [], BLOCK=8192)
for match in re.findall(r"(?:ld|st)\\.global\\S*|shfl\\S*", ptx):
    print(match)
"""


@pytest.mark.parametrize("patch, dtype, image, counts", [
    (16, "bf16", "u8", "all"), (16, "fp16", "fp32", "ragged"), (8, "fp32", "u8", "all"), (14, "bf16", "bf16", "ragged"),
])  # fmt: skip
def test_the_kernels_compile_to_wide_loads_and_few_shuffles(patch, dtype, image, counts):
    if not HAS_TRITON or torch.version.cuda is None:
        pytest.skip("needs Triton with its CUDA back end")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, str(patch), dtype, image, counts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    operations = done.stdout.split()
    assert sum(x.startswith("shfl") for x in operations) < 100
    wide = "v2.b32" if patch == 14 else "v4.b32"  # 588 values are a multiple of 4 alone
    assert f"ld.global.{wide}" in operations and f"st.global.{wide}" in operations
