"""Losses between the samples of all ranks: gather with gradient, InfoNCE and sigmoid in bounded memory, learned scale.

Every rank holds the same number of rows; row i of rank r is row r·B + i of all. Everything is computed in fp32.
Without a process group, the rank's own rows are all rows. Dimension letters: B rows of this rank, M rows of all
ranks, E size of an embedding.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mug.kernels.linear_cross_entropy import MEMORY_BUDGET, linear_cross_entropy

IGNORED = -100  # the target of a row that has no loss
EXCLUDED = -1e4  # added to the logit of a key that does not count: far below -scale, and its exponential is 0


def rank_and_world() -> tuple[int, int]:
    """Returns this rank and the number of ranks that samples may come from."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(x: Tensor) -> Tensor:
    """Returns the rows of all ranks, [M, ...], of [B, ...]; the gradient of a row is the sum of all ranks' gradients.

    With a loss that each rank takes over its own rows, and gradients averaged over ranks, this gives the gradient of
    the mean over all rows. A collective call, and another in backward.
    """
    return _Gather.apply(x) if rank_and_world()[1] > 1 else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        gathered = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]  # PyTorch's way
        rank, world = rank_and_world()
        gradient = gradient.contiguous()
        if gradient.is_cuda:
            mine = gradient.new_empty(len(gradient) // world, *gradient.shape[1:])
            dist.reduce_scatter_tensor(mine, gradient)
            return mine
        total = gradient.clone()  # gloo: all_reduce serves every dtype, reduce_scatter does not
        dist.all_reduce(total)
        return total.chunk(world)[rank]


def contrastive_loss(
    query_BE: Tensor, key_BE: Tensor, scale: Tensor | float, valid_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """InfoNCE (arXiv 1807.03748) of this rank's queries against the keys of all ranks: query i belongs to key i.

    Logits are taken some rows at a time (see linear_cross_entropy), so [B, M] never exists where that is large.

    Args:
        query_BE, key_BE: floating [B, E], of unit length.
        scale: what cosines are multiplied by, a number or a tensor of one element.
        valid_B: bool [B]; a row that is not valid is neither query nor key, on any rank. None: all are.

    Returns:
        (loss, accuracy), fp32 scalars: means over this rank's valid rows, 0 where it has none; accuracy, the share of
        them that no other valid key is closer to, is detached.
    """
    rank, _ = rank_and_world()
    with torch.autocast(query_BE.device.type, enabled=False):
        query_BE, key_ME = query_BE.float() * scale, gather(key_BE.float())
        row_B = torch.arange(len(query_BE), device=query_BE.device)
        target_B = row_B + rank * len(query_BE)
        if valid_B is None:
            return linear_cross_entropy(query_BE, key_ME, target_B, ignore_index=IGNORED, kept_K=row_B)
        # One more feature: 1 in every query; 0 in a key, or what takes it out of every softmax.
        excluded_M1 = gather(torch.where(valid_B, 0.0, EXCLUDED)[:, None])
        query_BF = torch.cat([query_BE, torch.ones_like(query_BE[:, :1])], 1)
        key_MF = torch.cat([key_ME, excluded_M1], 1)
        return linear_cross_entropy(query_BF, key_MF, target_B.where(valid_B, IGNORED), ignore_index=IGNORED)


def pair_loss(
    image_BE: Tensor, text_BE: Tensor, scale: Tensor | float, valid_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """CLIP's loss (arXiv 2103.00020, figure 3): the mean of `contrastive_loss` from image to text and back.

    Arguments and results are those of `contrastive_loss`.
    """
    to_text = contrastive_loss(image_BE, text_BE, scale, valid_B)
    to_image = contrastive_loss(text_BE, image_BE, scale, valid_B)
    return (to_text[0] + to_image[0]) / 2, (to_text[1] + to_image[1]) / 2


def two_view_loss(
    first_BE: Tensor, second_BE: Tensor, temperature: float, memory_budget: int = MEMORY_BUDGET
) -> tuple[Tensor, Tensor]:
    """SimCLR's NT-Xent loss (arXiv 2002.05709, equation 1): each view against all other views of all ranks.

    Args:
        first_BE, second_BE: floating [B, E] of unit length, two views of the same samples.
        memory_budget: bytes that logits may take at a time, min one row; what exceeds it is computed twice.

    Returns:
        (loss, accuracy), fp32 scalars: means over both views of this rank's samples; accuracy, the share of them to
        which no view is closer than the other of the same sample, is detached.
    """
    with torch.autocast(first_BE.device.type, enabled=False):
        views = first_BE.float(), second_BE.float()
        keys = [gather(view) for view in views]
        found = [
            _others_view(views[i] / temperature, keys[1 - i], keys[i], max(memory_budget // (8 * len(keys[0])), 1))
            for i in (0, 1)
        ]
    return (found[0][0] + found[1][0]) / 2, (found[0][1] + found[1][1]) / 2


def _others_view(query_BE: Tensor, positive_ME: Tensor, same_ME: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Returns the loss of one view, `rows` at a time: `positive_ME` holds the other views, `same_ME` these ones."""

    def part(query_RE: Tensor, own_R1: Tensor) -> tuple[Tensor, Tensor]:
        logits_RK = (query_RE @ key_KE.T).scatter(1, own_R1 + len(positive_ME), -torch.inf)  # never a view itself
        hit_R = logits_RK.detach().argmax(1) == own_R1.squeeze(1)
        return nn.functional.cross_entropy(logits_RK, own_R1.squeeze(1), reduction="sum"), hit_R.sum()

    key_KE = torch.cat([positive_ME, same_ME])
    own_B1 = torch.arange(len(query_BE), device=query_BE.device)[:, None] + rank_and_world()[0] * len(query_BE)
    loss, hits = _sum_over_rows(part, rows, query_BE, own_B1)
    return loss / len(query_BE), hits / len(query_BE)


def sigmoid_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    valid_B: Tensor | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> tuple[Tensor, Tensor]:
    """SigLIP's loss (arXiv 2303.15343, section 3.2): whether image and caption belong together, for each pair of all.

    Args:
        image_BE, text_BE: floating [B, E] of unit length.
        scale, bias: a logit is scale x cosine + bias; numbers or tensors of one element.
        valid_B: bool [B]; a row that is not valid is in no pair, on any rank. None: all are valid.
        memory_budget: bytes that logits may take at a time, min one row; what exceeds it is computed twice.

    Returns:
        (loss, accuracy), fp32 scalars: the pairs of this rank's valid images with the valid captions of all ranks,
        summed, a valid image; 0 where there is none. accuracy, the share of these images that no other valid caption
        is closer to, is detached.
    """
    with torch.autocast(image_BE.device.type, enabled=False):
        query_BE, text_ME = image_BE.float() * scale, gather(text_BE.float())
        valid_B = query_BE.new_ones(len(query_BE)) if valid_B is None else valid_B.float()
        valid_M = gather(valid_B)

        def part(query_RE: Tensor, own_R1: Tensor, valid_R: Tensor) -> tuple[Tensor, Tensor]:
            logits_RM = query_RE @ text_ME.T + bias
            signed_RM = logits_RM * torch.ones_like(logits_RM).scatter(1, own_R1, -1.0)
            seen_RM = logits_RM.detach() + EXCLUDED * (1 - valid_M)
            hit_R = seen_RM.gather(1, own_R1).squeeze(1) >= seen_RM.amax(1)
            return (nn.functional.softplus(signed_RM) @ valid_M) @ valid_R, hit_R.float() @ valid_R

        own_B1 = torch.arange(len(query_BE), device=query_BE.device)[:, None] + rank_and_world()[0] * len(query_BE)
        rows = max(memory_budget // (16 * len(text_ME)), 1)
        loss, hits = _sum_over_rows(part, rows, query_BE, own_B1, valid_B)
        count = valid_B.sum().clamp(min=1)
        return loss / count, hits / count


def _sum_over_rows(part: Callable[..., tuple[Tensor, Tensor]], rows: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums of (loss, hits) that `part` gives for `rows` rows of the tensors at a time; of several parts,
    backward computes each again."""
    chunks = list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
    run = part if len(chunks) == 1 else functools.partial(checkpoint, part, use_reentrant=False)
    losses, hits = zip(*(run(*chunk) for chunk in chunks), strict=True)
    return torch.stack(losses).sum(), torch.stack(hits).sum()


class LogitScale(nn.Module):
    """A learned scale of cosines, at most `maximum`: `scale()` is fp32 [1].

    The logarithm is the parameter, as in CLIP; it has one dimension, without which DeepSpeed cannot broadcast it. It is
    clamped in forward, never in place: under ZeRO the optimizer's fp32 copy would grow behind such a clamp. At the
    maximum, a gradient that would raise it is cut, so it comes back as soon as the gradient turns.
    """

    def __init__(self, scale: float = 1 / 0.07, maximum: float = 100.0):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.log_maximum = math.log(maximum)

    def forward(self) -> Tensor:
        return _ClampFromAbove.apply(self.log_scale.float(), self.log_maximum).exp()


class _ClampFromAbove(torch.autograd.Function):
    """Returns min(x, maximum); the gradient is the mean over ranks, less what would push x beyond the maximum.

    Cut rank by rank before the engine averages, the gradient would depend on how samples lie on ranks.
    """

    @staticmethod
    def forward(ctx, x: Tensor, maximum: float) -> Tensor:
        ctx.save_for_backward(x >= maximum)
        return x.clamp(max=maximum)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]  # PyTorch's way
        (reached,) = ctx.saved_tensors
        _, world = rank_and_world()
        if world > 1:
            gradient = gradient / world
            dist.all_reduce(gradient)
        return gradient.where(~reached | (gradient > 0), 0.0), None
