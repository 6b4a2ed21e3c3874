"""Vocabulary projection and cross-entropy in one step: the caption head.

Dimension letters: N rows (tokens), D width, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, *, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of `hidden @ weightᵀ` over the rows whose target is not `ignore_index`.

    Rows to ignore are dropped before the product, so padding costs nothing.

    Args:
        hidden_ND: floating [N, D]; weight_VD: same dtype [V, D]; target_N: int64 [N].

    Returns:
        (loss, accuracy), fp32 scalars: the mean over the kept rows, and the share of them whose largest
        logit is the target (detached). Without a kept row both are 0, and the gradients are zero.

    Raises:
        ValueError: shapes that disagree; it names the argument.
    """
    if hidden_ND.shape[0] != target_N.shape[0]:
        raise ValueError(f"hidden has {hidden_ND.shape[0]} rows, target {target_N.shape[0]}")
    if hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden has width {hidden_ND.shape[1]}, weight {weight_VD.shape[1]}")
    kept = (target_N != ignore_index).nonzero().squeeze(1)
    count = max(kept.numel(), 1)
    logits_NV = F.linear(hidden_ND[kept], weight_VD).float()
    target_N = target_N[kept]
    loss = F.cross_entropy(logits_NV, target_N, reduction="sum") / count
    accuracy = (logits_NV.detach().argmax(-1) == target_N).sum() / count
    return loss, accuracy
