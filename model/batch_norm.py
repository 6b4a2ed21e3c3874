"""Batch norm over the samples of all ranks, with statistics that checkpoints hold as an objective's extra state.

Dimension letters: B batch, C channels, n values of a channel.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """Batch norm (arXiv 1502.03167) of [B, C] or [B, C, H, W], its mean and variance over all ranks' samples.

    In training a forward and a backward pass are collective calls. Inside all is fp32; the result has the input's
    dtype. `running_mean` and `running_var`, fp32 [C], the same on all ranks, are used in evaluation. They are not
    buffers, so that bf16 leaves them alone; an objective passes them on: see `batch_norm_state`.

    A layer before it should have no bias: its gradient would be only rounding, which AdamW turns into steps.

    Args:
        momentum: the weight of a batch in the running statistics.
        affine: whether a learned weight and bias follow.

    Raises:
        ValueError: one value a channel on all ranks together, in training.
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True):
        super().__init__()
        self.channels, self.eps, self.momentum = channels, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.running_mean, self.running_var = torch.zeros(channels), torch.ones(channels)
        self.updates_statistics = True

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, momentum={self.momentum}, affine={self.weight is not None}"

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            h = x.float()
            self.running_mean, self.running_var = self.running_mean.to(x.device), self.running_var.to(x.device)
            if self.training:
                h, mean_C, var_C, n = _Normalize.apply(h, self.eps)
                if self.updates_statistics:
                    self._update(mean_C, var_C * n / (n - 1))
            else:
                h = (h - _along(self.running_mean, x)) * _along((self.running_var + self.eps).rsqrt(), x)
            if self.weight is not None and self.bias is not None:
                h = h * _along(self.weight.float(), x) + _along(self.bias.float(), x)
            return h.to(x.dtype)

    @torch.no_grad()
    def _update(self, mean_C: Tensor, var_C: Tensor) -> None:
        """Update the statistics; a batch that is not finite, which the optimizer skips, leaves them unchanged."""
        mean_C, var_C = self.running_mean.lerp(mean_C, self.momentum), self.running_var.lerp(var_C, self.momentum)
        finite_C = mean_C.isfinite() & var_C.isfinite()
        self.running_mean = mean_C.where(finite_C, self.running_mean)
        self.running_var = var_C.where(finite_C, self.running_var)


class _Normalize(torch.autograd.Function):
    """Returns (x̂, mean, variance, n): x̂ is fp32 x less the mean of its channel over all ranks, over the deviation."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean_C, square_C, n = _moments(x)
        var_C = square_C / n
        scale_C = (var_C + eps).rsqrt()
        normalized = (x - _along(mean_C, x)) * _along(scale_C, x)
        ctx.save_for_backward(normalized, scale_C, n)
        ctx.mark_non_differentiable(mean_C, var_C, n)
        return normalized, mean_C, var_C, n

    @staticmethod
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]  # PyTorch's way
        normalized, scale_C, n = ctx.saved_tensors
        dims = _others(gradient)
        sums_2C = torch.stack([gradient.sum(dims), (gradient * normalized).sum(dims)])
        if dist.is_initialized():
            dist.all_reduce(sums_2C)
        mean_C, slope_C = sums_2C / n
        centred = gradient - _along(mean_C, gradient) - normalized * _along(slope_C, gradient)
        return centred * _along(scale_C, gradient), None


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (mean [C], sum of squared deviations from it [C], n []), over all ranks' values.

    Each rank's are taken about its own mean and then combined (Chan et al. 1979): E[x²] - E[x]² loses all digits where
    the mean is large compared with the deviation.
    """
    dims, count = _others(x), x.numel() // x.shape[1]
    world = dist.get_world_size() if dist.is_initialized() else 1
    if count * world < 2:
        raise ValueError(f"batch norm in training needs 2 values a channel; {list(x.shape)} holds {count}")
    mean_C = x.mean(dims)
    square_C = (x - _along(mean_C, x)).square().sum(dims)
    n = torch.full((), count, dtype=x.dtype, device=x.device)
    if world == 1:
        return mean_C, square_C, n
    mine = torch.cat([mean_C, square_C, n[None]])
    parts = mine.new_empty(world * len(mine))
    dist.all_gather_into_tensor(parts, mine)
    parts = parts.view(world, -1)
    means_WC, squares_WC, n_W1 = parts.split([x.shape[1], x.shape[1], 1], dim=1)
    n = n_W1.sum()
    mean_C = (means_WC * n_W1).sum(0) / n
    return mean_C, (squares_WC + (means_WC - mean_C).square() * n_W1).sum(0), n


def _others(x: Tensor) -> list[int]:
    """Returns all dimensions but the channels'."""
    return [dim for dim in range(x.dim()) if dim != 1]


def _along(values_C: Tensor, x: Tensor) -> Tensor:
    """Returns [C] in a shape that broadcasts along the channels of x."""
    return values_C.view(-1, *[1] * (x.dim() - 2))


# --- A model's batch norms together --------------------------------------------------------------------------


def batch_norm_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the running statistics of all batch norms of the model, fp32 [C], by MODULE.running_mean and …var."""
    state = {}
    for name, norm in _batch_norms(model):
        state |= {f"{name}.running_mean": norm.running_mean, f"{name}.running_var": norm.running_var}
    return state


def load_batch_norm_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Restore what `batch_norm_state` returned; KeyError where one is missing."""
    for name, norm in _batch_norms(model):
        norm.running_mean = state[f"{name}.running_mean"].float().clone()
        norm.running_var = state[f"{name}.running_var"].float().clone()


@contextlib.contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of the model's batch norms unchanged: for a pass that will be repeated."""
    norms = [norm for _, norm in _batch_norms(model)]
    for norm in norms:
        norm.updates_statistics = False
    try:
        yield
    finally:
        for norm in norms:
            norm.updates_statistics = True


def convert_batch_norms(model: nn.Module) -> nn.Module:
    """Replace each of torch's batch norms by a BatchNorm, with its parameters and statistics; returns the model."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            assert child.momentum is not None  # None is a mean over all batches
            norm = BatchNorm(child.num_features, child.eps, child.momentum, child.affine)
            norm.weight, norm.bias = child.weight, child.bias
            assert child.running_mean is not None and child.running_var is not None
            norm.running_mean, norm.running_var = child.running_mean.clone(), child.running_var.clone()
            setattr(model, name, norm)
        else:
            convert_batch_norms(child)
    return model


def _batch_norms(model: nn.Module) -> list[tuple[str, BatchNorm]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BatchNorm)]
