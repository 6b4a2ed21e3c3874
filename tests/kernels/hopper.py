"""Compile kernels for a GPU that need not be there (sm_90): python hopper.py attention 64 | linear_cross_entropy.

Prints a line of JSON for each kernel: registers, spilled bytes, shared memory, and counts of PTX instructions. Run
apart from the tests, where Triton interprets.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mug.kernels import attention_op, attention_triton_small, attention_triton_tiled
from mug.kernels import linear_cross_entropy_triton as head
from mug.kernels.attention_triton import split_head

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
INTEGERS = ("q_stride", "k_stride", "Nq", "Nk", "rows", "H", "tiles", "stride", "V")
FLOATS = ("scale", "smoothing", "z_loss")
ALIGNED = ("q_stride", "k_stride", "stride")
POINTERS = {"cu_seqlens_q": "i32", "cu_seqlens_k": "i32", "kv_lengths": "i32", "target": "i64"}
POINTERS |= dict.fromkeys(("lse", "delta", "loss", "hit"), "fp32")


def figures(name, kernel, **constants):
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    signature = {}
    for argument in kernel.arg_names:
        kind = "i32" if argument in INTEGERS else "fp32" if argument in FLOATS else None
        kind = "constexpr" if argument in constants else kind
        signature[argument] = kind or "*" + POINTERS.get(argument, "bf16")
    aligned = [n for n, kind in signature.items() if kind[0] == "*" or n in ALIGNED]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    patterns = {"tensor_core": r"wgmma\.mma_async|mma\.sync", "wide_loads": r"ld\.global\S*v4|cp\.async\.c\S+ "}
    patterns |= {"loads": r"ld\.global|cp\.async\.c\S+ ", "wide_stores": r"st\.global\S*v4"}
    counts = {key: len(re.findall(pattern, compiled.asm["ptx"])) for key, pattern in patterns.items()}
    row = {"kernel": name, "registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"]}
    print(json.dumps({**row, **counts, "shared": compiled.metadata.shared}))


def attention(D):
    main, tail = split_head(D)
    for flags in ({}, {"CAUSAL": True, "PACKED": True, "PADDED": True}):
        sizes = {"CAUSAL": False, "PACKED": False, "PADDED": False} | flags | {"D": D, "D1": main, "D2": tail}
        for name in ("forward_kernel", "backward_kernel"):
            blocks = attention_op.small_blocks(64, 64)
            figures(f"small {name} {D}", getattr(attention_triton_small, name), **sizes, **blocks)
        for name in ("forward", "dq", "dkdv"):
            blocks = attention_op.tiled_blocks(name, torch.bfloat16, D)
            figures(f"tiled {name} {D}", getattr(attention_triton_tiled, f"{name}_kernel"), **sizes, **blocks)


if __name__ == "__main__":
    if sys.argv[1] == "attention":
        attention(int(sys.argv[2]))
    else:
        constants = {"GRADIENT": True, "BLOCK": head.BLOCK, "num_warps": head.NUM_WARPS}
        figures("linear_cross_entropy", head._loss_kernel, **constants)
