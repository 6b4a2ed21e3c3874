"""Blocks under torch.compile: norms, activations and residuals fused, and fewer launches.

Only a block's arithmetic is compiled. The block itself, on which DeepSpeed's hooks gather weights, and all
that depends on the batch's values stay as they are.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn

BACKEND = os.environ.get("MUG_COMPILE_BACKEND", "inductor")  # as torch.compile's


def compile_blocks(model: nn.Module) -> None:
    """Compile the layers of all blocks of the model, for training only; its first step then takes a minute or more.

    Blocks of one kind share what is compiled: for one batch size and, in a text block, any number of packed tokens.
    """
    for block in model.modules():
        if hasattr(block, "_layers"):
            _compile(block)


def _compile(block: Any) -> None:
    layers, compiled = block._layers, torch.compile(block._layers, backend=BACKEND, dynamic=False)

    def run(x: Tensor, *others: Any) -> Tensor:
        if not torch.is_grad_enabled():  # compiling for an evaluation would take longer than the evaluation
            return layers(x, *others)
        if block.ragged:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled(x, *others)

    block._layers = run
