"""Gradients of an earlier step that DeepSpeed would apply again."""

from typing import Any


def clear_gradients(engine: Any) -> None:
    """Before a step: set what ZeRO-3 has kept of the last step's gradients to zero.

    DeepSpeed 0.19.8 copies into that buffer in a step's first micro-batch, adds to it in the others, and never clears
    it: a parameter that the first does not use adds to the gradient of the step before, and one that the step does not
    use keeps it. The heads of a coupled objective are such parameters, and whatever some kinds of batch do not use.
    """
    optimizer = getattr(engine, "optimizer", None)
    if (partitions := getattr(optimizer, "grad_partitions_flat_buffer", None)) is None:
        return  # not ZeRO-3
    partitions.zero_()
    if optimizer.offload_optimizer:
        for flat in optimizer.fp32_partitioned_groups_flat:
            if flat.grad is not None:
                flat.grad.zero_()


def collect_gradients(engine: Any) -> None:
    """Before the engine's last call of step(): hand an offloaded optimizer the gradients of all micro-batches.

    DeepSpeed 0.19.8 hands over those of the parameters that the last micro-batch uses, and forgets the others'.
    """
    optimizer = getattr(engine, "optimizer", None)
    if getattr(optimizer, "grad_partitions_flat_buffer", None) is not None and optimizer.offload_optimizer:
        optimizer._finalize_offload_gradient_accumulation()
