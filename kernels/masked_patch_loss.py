"""Mean squared error on the masked patches of an image (MAE, arXiv 2111.06377, section 3).

Dimension letters: B batch, N patches, M masked patches, P = patch_size² · 3 values of a patch.
"""

import functools
import importlib.util
import logging
import math
import os

import torch
from torch import Tensor

from mug.kernels.errors import BackendError

EPS = 1e-6
BACKENDS = ("auto", "triton", "reference")
DEFAULT_BACKEND = os.environ.get("MUG_MASKED_PATCH_LOSS_BACKEND", "auto")  # of calls that do not name one
PATCH_SIZES = (8, 14, 16, 32)
PREDICTIONS = (torch.float32, torch.float16, torch.bfloat16)
IMAGES = (torch.uint8, *PREDICTIONS)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # imported at the first use of a kernel

logger = logging.getLogger(__name__)


def patchify(image_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut [B, 3, H, W] into patches [B, N, P], raster order, values of a patch ordered (row, column, channel)."""
    B, C, H, W = image_BCHW.shape
    h, w = H // patch_size, W // patch_size
    x = image_BCHW.reshape(B, C, h, patch_size, w, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, h * w, patch_size**2 * C)


def gather_patches(image_BCHW: Tensor, index_BM: Tensor, patch_size: int) -> Tensor:
    """Returns the patches named by int64 `index_BM` [B, M], as [B, M, P] in the image's dtype."""
    patches_BNP = patchify(image_BCHW, patch_size)
    return patches_BNP.gather(1, index_BM[..., None].expand(-1, -1, patches_BNP.shape[-1]))


def normalize_channels(patches_BMP: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Returns fp32 [B, M, P]: uint8 values scaled to 0..1 first, then (x - mean) / std by channel."""
    constants_2P = patches_BMP.new_empty(2, patches_BMP.shape[-1], dtype=torch.float32)
    for row_P, channels in zip(constants_2P, (mean, std), strict=True):
        for channel, value in enumerate(channels):
            row_P[channel :: len(channels)].fill_(
                value
            )  # torch.tensor on a GPU would be a copy that the host waits for
    mean_P, std_P = constants_2P * (255.0 if patches_BMP.dtype == torch.uint8 else 1.0)
    return (patches_BMP.float() - mean_P) / std_P


def patch_statistics(patches_BMP: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation [B, M, 1] of each patch, as MAE has them: unbiased, eps inside the root."""
    variance, mean = torch.var_mean(patches_BMP, dim=-1, keepdim=True)
    return mean, (variance + EPS).sqrt()


def masked_patch_loss(
    image_BCHW: Tensor,
    prediction_BMP: Tensor,
    masked_BM: Tensor,
    *,
    patch_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    normalize_patches: bool = True,
    counts_B: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Returns the mean over masked patches of the squared error between prediction and (normalised) pixels.

    The gradient goes only to the prediction. The Triton kernel writes it in the forward pass; backward multiplies
    it by grad_output in place (by 1: not at all), so its graph can be walked once.

    Args:
        image_BCHW: uint8 [B, 3, H, W], or floating in 0..1; H and W multiples of patch_size.
        prediction_BMP: floating [B, M, P], P = patch_size² · 3, ordered (row, column, channel).
        masked_BM: int64 [B, M], raster index of each masked patch.
        patch_size: pixels.
        mean, std: of each channel, for pixels in 0..1.
        normalize_patches: regress each patch less its mean, over its standard deviation.
        counts_B: int [B], patches from there on count for nothing, whatever stands in them; None: all M count.
            Without a single one that counts, loss and gradient are 0.
        backend: "triton", "reference" (plain PyTorch) or "auto" (triton on CUDA where it serves, else reference);
            None takes $MUG_MASKED_PATCH_LOSS_BACKEND, else "auto".

    Returns:
        fp32 scalar.

    Raises:
        ValueError: shapes that disagree, an unknown backend, or "triton" where it cannot serve; it names the
            argument. On CPU also an index out of range; on CUDA the kernel cannot report to the host: it reads nothing
            out of bounds, and the loss is NaN.
    """
    _check_shapes(image_BCHW, prediction_BMP, masked_BM, counts_B, patch_size)
    backend = _choose_backend(backend or DEFAULT_BACKEND, image_BCHW, prediction_BMP, masked_BM, counts_B, patch_size)
    if masked_BM.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(image_BCHW, masked_BM, counts_B, patch_size)
    if backend == "reference":
        return _reference(image_BCHW, prediction_BMP, masked_BM, patch_size, mean, std, normalize_patches, counts_B)
    needs_gradient = prediction_BMP.requires_grad and torch.is_grad_enabled()
    settings = (patch_size, list(mean), list(std), normalize_patches, needs_gradient)
    return _fused(image_BCHW, prediction_BMP, masked_BM, counts_B, *settings)[0]


def _check_shapes(
    image_BCHW: Tensor, prediction_BMP: Tensor, masked_BM: Tensor, counts_B: Tensor | None, patch_size: int
) -> None:
    if len(image_BCHW) != len(masked_BM):
        raise ValueError(f"image holds {len(image_BCHW)} samples, masked {len(masked_BM)}")
    expected = (*masked_BM.shape, patch_size**2 * image_BCHW.shape[1])
    if tuple(prediction_BMP.shape) != expected:
        raise ValueError(f"prediction has shape {tuple(prediction_BMP.shape)}, expected {expected}")
    if image_BCHW.shape[2] % patch_size or image_BCHW.shape[3] % patch_size:
        raise ValueError(f"image {tuple(image_BCHW.shape[2:])} is not a multiple of patch_size={patch_size}")
    if counts_B is not None and counts_B.shape != masked_BM.shape[:1]:
        raise ValueError(f"counts has shape {tuple(counts_B.shape)}, expected ({len(masked_BM)},)")


def _check_values(image_BCHW: Tensor, masked_BM: Tensor, counts_B: Tensor | None, patch_size: int) -> None:
    patches = (image_BCHW.shape[2] // patch_size) * (image_BCHW.shape[3] // patch_size)
    if counts_B is not None and ((counts_B < 0) | (counts_B > masked_BM.shape[1])).any():
        raise ValueError(f"counts must lie in 0..{masked_BM.shape[1]}, got {counts_B.tolist()}")
    named = masked_BM if counts_B is None else masked_BM[_counted(masked_BM, counts_B)]
    if ((named < 0) | (named >= patches)).any():
        raise ValueError(f"masked names patches {int(named.min())} to {int(named.max())}, the image has {patches}")


def _counted(masked_BM: Tensor, counts_B: Tensor) -> Tensor:
    """Returns bool [B, M], True where the patch counts."""
    return torch.arange(masked_BM.shape[1], device=masked_BM.device) < counts_B[:, None]


def _choose_backend(
    backend: str,
    image_BCHW: Tensor,
    prediction_BMP: Tensor,
    masked_BM: Tensor,
    counts_B: Tensor | None,
    patch_size: int,
) -> str:
    if backend not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise BackendError(f"backend={backend!r} is not one of {known}; see MUG_MASKED_PATCH_LOSS_BACKEND")
    if backend == "reference" or (backend == "auto" and prediction_BMP.device.type != "cuda"):
        return "reference"
    obstacle = _obstacle(image_BCHW, prediction_BMP, masked_BM, counts_B, patch_size)
    if backend == "triton" and obstacle:
        raise BackendError(f'masked_patch_loss backend="triton" cannot serve this call: {obstacle}')
    if backend == "auto" and not torch.compiler.is_compiling():
        _log_choice(obstacle)
    return "reference" if obstacle else "triton"


def _obstacle(
    image_BCHW: Tensor, prediction_BMP: Tensor, masked_BM: Tensor, counts_B: Tensor | None, patch_size: int
) -> str | None:
    """Returns why the kernel cannot serve, naming the argument; None if it can."""
    tensors = {"image": image_BCHW, "masked": masked_BM, "counts": counts_B}
    strangers = [name for name, x in tensors.items() if x is not None and x.device != prediction_BMP.device]
    if not HAS_TRITON:
        return "triton is not installed"
    if strangers:
        return f"{strangers[0]} and prediction are on different devices"
    if prediction_BMP.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"prediction is on {prediction_BMP.device.type}, which needs TRITON_INTERPRET=1"
    if patch_size not in PATCH_SIZES or image_BCHW.shape[1] != 3:
        return f"patch_size={patch_size} of {image_BCHW.shape[1]} channels; it takes {PATCH_SIZES} of 3 channels"
    if image_BCHW.dtype not in IMAGES:
        return f"image is {image_BCHW.dtype}"
    if prediction_BMP.dtype not in PREDICTIONS:
        return f"prediction is {prediction_BMP.dtype}"
    if masked_BM.dtype != torch.int64:
        return f"masked is {masked_BM.dtype}, not int64"
    if counts_B is not None and counts_B.dtype not in (torch.int32, torch.int64):
        return f"counts is {counts_B.dtype}, not int32 or int64"
    return None if prediction_BMP.numel() else "prediction is empty"


@functools.cache
def _log_choice(obstacle: str | None) -> None:
    logger.info("masked_patch_loss: %s", f"reference, because {obstacle}" if obstacle else "triton")


def _reference(
    image_BCHW: Tensor,
    prediction_BMP: Tensor,
    masked_BM: Tensor,
    patch_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    normalize_patches: bool,
    counts_B: Tensor | None,
) -> Tensor:
    counted_BM = None if counts_B is None else _counted(masked_BM, counts_B)
    if counted_BM is not None:  # the index of a patch that does not count may be anything, such as -1
        masked_BM = masked_BM.where(counted_BM, 0)
    target_BMP = normalize_channels(gather_patches(image_BCHW, masked_BM, patch_size), mean, std)
    if normalize_patches:
        patch_mean, patch_std = patch_statistics(target_BMP)
        target_BMP = (target_BMP - patch_mean) / patch_std
    error_BMP = prediction_BMP.float() - target_BMP
    if counted_BM is None:
        return error_BMP.square().mean()
    return error_BMP.masked_fill(~counted_BM[..., None], 0.0).square().sum() / _total(prediction_BMP, counts_B)


def _total(prediction_BMP: Tensor, counts_B: Tensor | None) -> float | Tensor:
    """Returns how many values the loss is a mean over; a tensor where counts are, so that the host does not wait."""
    if counts_B is None:
        return float(prediction_BMP.numel())
    _, M, P = prediction_BMP.shape
    return (counts_B.clamp(0, M).sum() * P).clamp(min=1).float()


def _gradient_factors(prediction_BMP: Tensor, counts_B: Tensor | None) -> tuple[float | Tensor, float | Tensor]:
    """Returns 2 / total as the factors of the error in forward and in backward.

    Forward takes all, except that fp16 would lose it (1e-7 at batch 256): there backward applies the power of two,
    when the loss scale is on, and rounds nothing by it.
    """
    factor = 2 / _total(prediction_BMP, counts_B)
    if prediction_BMP.dtype != torch.float16:
        return factor, 1.0
    early = math.frexp(factor)[0] if isinstance(factor, float) else torch.frexp(factor)[0]
    return early, factor / early


@torch.library.custom_op("mug::masked_patch_loss", mutates_args=())
def _fused(
    image_BCHW: Tensor,
    prediction_BMP: Tensor,
    masked_BM: Tensor,
    counts_B: Tensor | None,
    patch_size: int,
    mean: list[float],
    std: list[float],
    normalize_patches: bool,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Returns (loss, what backward scales to the gradient: [B, M, P] in prediction's dtype, or empty)."""
    from mug.kernels import masked_patch_loss_triton as kernels

    unit = 255.0 if image_BCHW.dtype == torch.uint8 else 1.0
    gradient_BMP = torch.empty_like(prediction_BMP, memory_format=torch.contiguous_format) if needs_gradient else None
    loss_R = kernels.loss_and_gradient(
        image_BCHW.contiguous(),
        prediction_BMP.contiguous(),
        masked_BM.contiguous(),
        None if counts_B is None else counts_B.contiguous(),
        1 / _total(prediction_BMP, counts_B),
        ([1 / (s * unit) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]),
        patch_size=patch_size,
        eps=EPS if normalize_patches else None,
        gradient_BMP=gradient_BMP,
        gradient_factor=_gradient_factors(prediction_BMP, counts_B)[0],
    )
    # Each program wrote its own sums: the total does not depend on which came first.
    return loss_R.sum(), prediction_BMP.new_empty(0) if gradient_BMP is None else gradient_BMP


@_fused.register_fake
def _(image_BCHW, prediction_BMP, masked_BM, counts_B, patch_size, mean, std, normalize_patches, needs_gradient):
    loss = prediction_BMP.new_empty((), dtype=torch.float32)
    return loss, prediction_BMP.new_empty(prediction_BMP.shape if needs_gradient else 0)


@torch.library.custom_op("mug::scale_", mutates_args=("gradient",))
def _scale_(gradient: Tensor, scale: Tensor) -> None:
    from mug.kernels import masked_patch_loss_triton as kernels

    kernels.scale_(gradient, scale)


@_scale_.register_fake
def _(gradient, scale):
    return None


def _save_for_backward(ctx, inputs, output) -> None:
    _, prediction_BMP, _, counts_B, *_ = inputs
    ctx.set_materialize_grads(False)
    _, factor = _gradient_factors(prediction_BMP, counts_B)
    ctx.factor, factor = (factor, None) if isinstance(factor, float) else (None, factor)
    ctx.save_for_backward(output[1], factor)


def _backward(ctx, grad_output: Tensor | None, _) -> tuple[Tensor | None, ...]:
    gradient_BMP, factor = ctx.saved_tensors
    if grad_output is None:
        return (None,) * 9
    _scale_(gradient_BMP, grad_output.float() * (ctx.factor if factor is None else factor))
    return None, gradient_BMP.detach(), *(None,) * 7


_fused.register_autograd(_backward, setup_context=_save_for_backward)
