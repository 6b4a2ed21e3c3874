"""Activation checkpointing: backward recomputes activations instead of keeping them, less memory for some time.

"elementwise" keeps the inputs of layer norms and GELUs, but not their outputs, which the next linear layers take:
about a quarter of what a block keeps, for a few percent of its time. "blocks" keeps only the input of
each block (activation checkpointing, arXiv 1604.06174), for a third of the time.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

POLICIES = ("none", "elementwise", "blocks")


def activation_checkpointing(model: nn.Module, policy: str) -> None:
    """Set the policy of all blocks of the model; the results stay the same to the bit.

    Under torch.compile "elementwise" changes nothing: the compiler makes such choices itself.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "activation_checkpointing"):
            module.activation_checkpointing = policy


def checkpointed(layers: Callable[..., Tensor], policy: str, x: Tensor, *others: Any) -> Tensor:
    """Returns layers(x, *others), of which backward keeps only the arguments if the policy is "blocks"."""
    if policy == "blocks" and torch.is_grad_enabled():
        return checkpoint(layers, x, *others, use_reentrant=False, preserve_rng_state=False)
    return layers(x, *others)


def recomputing_linear(function: Callable[[Tensor], Tensor], linear: nn.Module, policy: str, x: Tensor) -> Tensor:
    """Returns linear(function(x)), of which backward keeps x, but not function(x), if the policy is "elementwise".

    Where autocast makes the linear layer work on a copy of function(x) in another dtype, that copy is kept.
    """
    y = function(x)
    if policy != "elementwise" or torch.compiler.is_compiling():
        return linear(y)
    address = y.data_ptr()

    def keep(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.data_ptr() == address else saved

    def find(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return function(x).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(keep, find):
        return linear(y)
