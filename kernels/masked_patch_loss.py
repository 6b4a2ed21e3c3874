"""Mean squared error on the masked patches of an image (MAE, arXiv 2111.06377, section 3).

Dimension letters: B batch, N patches, M masked patches, P = patch_size² · 3 values of a patch.
"""

import torch
from torch import Tensor

EPS = 1e-6


def patchify(image_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut [B, 3, H, W] into patches [B, N, P], raster order, values of a patch ordered (row, column, channel)."""
    B, C, H, W = image_BCHW.shape
    h, w = H // patch_size, W // patch_size
    x = image_BCHW.reshape(B, C, h, patch_size, w, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, h * w, patch_size**2 * C)


def gather_patches(image_BCHW: Tensor, index_BM: Tensor, patch_size: int) -> Tensor:
    """The patches named by int64 `index_BM` [B, M], as [B, M, P] in the image's dtype."""
    patches_BNP = patchify(image_BCHW, patch_size)
    return patches_BNP.gather(1, index_BM[..., None].expand(-1, -1, patches_BNP.shape[-1]))


def normalize_channels(patches_BMP: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """fp32 [B, M, P]: uint8 values scaled to 0..1 first, then (x - mean) / std by channel."""
    scale = 255.0 if patches_BMP.dtype == torch.uint8 else 1.0
    mean_C = torch.tensor(mean, device=patches_BMP.device) * scale
    std_C = torch.tensor(std, device=patches_BMP.device) * scale
    x = patches_BMP.float().unflatten(-1, (-1, len(mean)))
    return ((x - mean_C) / std_C).flatten(-2)


def patch_statistics(patches_BMP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, M, 1] of each patch, as MAE has them: unbiased, eps inside the root."""
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
) -> Tensor:
    """Mean over masked patches of the squared error between prediction and (normalised) pixels.

    Args:
        image_BCHW: uint8 [B, 3, H, W], or floating in 0..1; H and W multiples of patch_size.
        prediction_BMP: floating [B, M, P], P = patch_size² · 3, ordered (row, column, channel).
        masked_BM: int64 [B, M], raster index of each masked patch.
        patch_size: pixels.
        mean, std: of each channel, for pixels in 0..1.
        normalize_patches: regress each patch less its mean, over its standard deviation.

    Returns:
        fp32 scalar.

    Raises:
        ValueError: shapes that disagree; it names the argument.
    """
    if len(image_BCHW) != len(masked_BM):
        raise ValueError(f"image holds {len(image_BCHW)} samples, masked {len(masked_BM)}")
    expected = (*masked_BM.shape, patch_size**2 * image_BCHW.shape[1])
    if tuple(prediction_BMP.shape) != expected:
        raise ValueError(f"prediction has shape {tuple(prediction_BMP.shape)}, expected {expected}")
    if image_BCHW.shape[2] % patch_size or image_BCHW.shape[3] % patch_size:
        raise ValueError(f"image {tuple(image_BCHW.shape[2:])} is not a multiple of patch_size={patch_size}")
    target_BMP = normalize_channels(gather_patches(image_BCHW, masked_BM, patch_size), mean, std)
    if normalize_patches:
        patch_mean, patch_std = patch_statistics(target_BMP)
        target_BMP = (target_BMP - patch_mean) / patch_std
    return (prediction_BMP.float() - target_BMP).square().mean()
