"""Compile kernels for a GPU that need not be there (sm_90).

python hopper.py attention 64 | linear_cross_entropy | masked_patch_loss

Prints a line of JSON for each kernel: registers, spilled bytes, shared memory, instructions of its longest loop, and
counts of PTX instructions. Run apart from the tests, where Triton interprets.
"""

import itertools
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
from mug.kernels import masked_patch_loss_triton as patches
from mug.kernels.attention_triton import split_head
from mug.kernels.masked_patch_loss import PATCH_SIZES

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
INTEGERS = ("q_stride", "k_stride", "dq_stride", "dk_stride", "Nq", "Nk", "rows", "H", "tiles", "stride", "V")
INTEGERS += ("M", "patches", "columns", "plane", "size")
FLOATS = ("scale", "smoothing", "z_loss", "eps", "inverse_total", "gradient_factor")
FLOATS += tuple(f"{name}_{channel}" for name in ("scale", "shift") for channel in range(3))
ALIGNED = ("q_stride", "k_stride", "dq_stride", "dk_stride", "stride", "plane", "size")
POINTERS = {"cu_seqlens_q": "i32", "cu_seqlens_k": "i32", "kv_lengths": "i32", "target": "i64"}
POINTERS |= dict.fromkeys(("lse", "delta", "loss", "hit"), "fp32") | {"masked": "i64", "counts": "i64"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resources(name, kernel, pointers=None, **constants):
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    signature = {}
    pointers = pointers or {}
    for argument in kernel.arg_names:
        kind = "i32" if argument in INTEGERS else "fp32" if argument in FLOATS else None
        kind = "constexpr" if argument in constants else None if argument in pointers else kind
        signature[argument] = kind or "*" + (POINTERS | pointers).get(argument, "bf16")
    aligned = [n for n, kind in signature.items() if kind[0] == "*" or n in ALIGNED]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    patterns = {"tensor_core": r"wgmma\.mma_async|mma\.sync", "wide_loads": r"ld\.global\S*v4|cp\.async\.c\S+ "}
    patterns |= {"loads": r"ld\.global|cp\.async\.c\S+ ", "wide_stores": r"st\.global\S*v4"}
    patterns |= {"wide_in_pairs": r"(?:ld|st)\.global\S*v2", "shuffles": r"shfl"}
    counts = {key: len(re.findall(pattern, compiled.asm["ptx"])) for key, pattern in patterns.items()}
    row = {"kernel": name, "registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"]}
    print(json.dumps({**row, **counts, "loop": longest_loop(code), "shared": compiled.metadata.shared}))


def longest_loop(code):
    """Instructions from where a jump backwards leads to the jump itself, in what cuobjdump -sass prints; 0: no loop."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)
    places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    jumps = [(i, re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)) for i, (_, text) in enumerate(lines)]
    lengths = [i + 1 - places[int(jump[1], 16)] for i, jump in jumps if jump]
    return max((n for n in lengths if n > 1), default=0)  # of 1: the trap behind a kernel's end


def attention(D):
    main, tail = split_head(D)
    for flags in ({}, {"CAUSAL": True, "PACKED": True, "PADDED": True}):
        sizes = {"CAUSAL": False, "PACKED": False, "PADDED": False} | flags | {"D": D, "D1": main, "D2": tail}
        for rows, name in itertools.product((64, 128), ("forward_kernel", "backward_kernel")):
            blocks = attention_op.small_blocks(rows, rows)
            resources(f"small {name} {D}, {rows} rows", getattr(attention_triton_small, name), **sizes, **blocks)
        for name in ("forward", "dq", "dkdv"):
            blocks = attention_op.tiled_blocks(name, torch.bfloat16, D)
            resources(f"tiled {name} {D}", getattr(attention_triton_tiled, f"{name}_kernel"), **sizes, **blocks)


def linear_cross_entropy():
    constants = {"GRADIENT": True, "BLOCK": head.BLOCK, "num_warps": head.NUM_WARPS}
    resources("linear_cross_entropy", head._loss_kernel, **constants)


def masked_patch_loss(patch_size):
    """The loss, as `loss_and_gradient` launches it, and the scaling of its gradient."""
    for prediction, image, ragged in (("bf16", "u8", False), ("fp16", "fp32", True), ("fp32", "u8", True)):
        tile = patches.tile(patch_size, DTYPES[prediction])
        words = image == "u8" and patch_size % tile["PIXELS"] == 0
        flags = {"WORDS": words, "RAGGED": ragged, "NORMALIZE": True, "GRADIENT": True}
        pointers = {"prediction": prediction, "gradient": prediction, "image": image}
        if words:
            pointers["image"] = patches.WORDS[tile["PIXELS"]].name.replace("int", "i")
        if ragged:
            pointers |= {"inverse_total": "fp32", "gradient_factor": "fp32"}
        resources(f"patch {patch_size} {prediction} {image}", patches._loss_kernel, pointers, **flags, **tile)
        pointers = {"gradient": prediction, "scale": "fp32"}
        resources(f"scale {prediction}", patches._scale_kernel, pointers, BLOCK=patches.SCALE_BLOCK)


if __name__ == "__main__":
    operator, *arguments = sys.argv[1:]
    if operator == "attention":
        attention(int(arguments[0]))
    elif operator == "masked_patch_loss":
        for size in PATCH_SIZES:
            masked_patch_loss(size)
    else:
        linear_cross_entropy()
