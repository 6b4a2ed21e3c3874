"""Triton kernels of masked_patch_loss; imported when first asked for, as Triton may be absent.

Dimension letters: R rows (masked patches) of one program, K values of a patch, padded to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES_PER_WARP = 1024  # 32 a lane: enough loads in flight, and the sums of a patch stay inside one warp
SCALE_BLOCK = 8192


@triton.jit
def _loss_kernel(
    image,
    prediction,
    masked,
    counts,
    inverse_total,
    gradient_factor,
    loss,
    gradient,
    rows,
    M,
    patches,
    columns,
    W,
    plane,
    mean_0,
    mean_1,
    mean_2,
    inverse_std_0,
    inverse_std_1,
    inverse_std_2,
    eps,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    # Values stand in the prediction's order (row, column, channel) from the first load to the last store, so that
    # prediction and gradient, four fifths of the bytes, move in 16-byte pieces. The image's planes are then read
    # value by value, but a warp's reads fall into few 32-byte sectors, which L1 keeps until all are used. Reading
    # planes in wide pieces instead needs a change of order: tl.gather costs 1,024 shuffles a patch.
    P: tl.constexpr = 3 * PATCH * PATCH
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample_R = (row_R // M).to(tl.int64)
    real_R = row_R < rows
    loss_factor, error_factor = inverse_total, gradient_factor
    if RAGGED:
        loss_factor, error_factor = tl.load(inverse_total), tl.load(gradient_factor)
        real_R = real_R & (row_R % M < tl.load(counts + sample_R, mask=real_R, other=0))
    index_R = tl.load(masked + row_R, mask=real_R, other=0)
    inside_R = (index_R >= 0) & (index_R < patches)
    index_R = tl.where(inside_R, index_R, 0)
    corner_R = sample_R * 3 * plane + index_R // columns * PATCH * W + index_R % columns * PATCH

    k = tl.arange(0, BLOCK)
    valid_RK = real_R[:, None] & (k < P)[None, :]
    channel_K, pixel_K = k % 3, k // 3
    offset_K = channel_K * plane + pixel_K // PATCH * W + pixel_K % PATCH
    place_RK = row_R.to(tl.int64)[:, None] * P + k[None, :]
    y_RK = tl.load(prediction + place_RK, mask=valid_RK, other=0.0).to(tl.float32)
    x_RK = tl.load(image + corner_R[:, None] + offset_K[None, :], mask=valid_RK, other=0).to(tl.float32)
    mean_K = tl.where(channel_K == 0, mean_0, tl.where(channel_K == 1, mean_1, mean_2))
    inverse_std_K = tl.where(channel_K == 0, inverse_std_0, tl.where(channel_K == 1, inverse_std_1, inverse_std_2))
    x_RK = tl.where(valid_RK, (x_RK - mean_K[None, :]) * inverse_std_K[None, :], 0.0)
    if NORMALIZE:
        x_RK = tl.where(valid_RK, x_RK - (tl.sum(x_RK, 1) / P)[:, None], 0.0)
        # Once more: on a flat patch the rounding of the mean, over sqrt(eps), would show in the target.
        x_RK = tl.where(valid_RK, x_RK - (tl.sum(x_RK, 1) / P)[:, None], 0.0)
        x_RK = x_RK * (1.0 / tl.sqrt_rn(tl.sum(x_RK * x_RK, 1) / (P - 1) + eps))[:, None]
    x_RK = tl.where(inside_R[:, None], x_RK, float("nan"))
    error_RK = tl.where(valid_RK, y_RK - x_RK, 0.0)
    tl.store(loss + row_R, tl.sum(error_RK * error_RK, 1) * loss_factor, mask=row_R < rows)
    if GRADIENT:
        tl.store(gradient + place_RK, error_RK * error_factor, mask=(row_R < rows)[:, None] & (k < P)[None, :])


@triton.jit
def _scale_kernel(gradient, scale, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale)
    work = place < tl.where(factor == 1.0, 0, size)  # 1 moves no memory, and the host need not look
    tl.store(gradient + place, tl.load(gradient + place, mask=work).to(tl.float32) * factor, mask=work)


def loss_and_gradient(
    image_BCHW: Tensor,
    prediction_BMP: Tensor,
    masked_BM: Tensor,
    counts_B: Tensor | None,
    inverse_total: float | Tensor,
    channels: tuple[list[float], list[float]],
    *,
    patch_size: int,
    eps: float | None,
    gradient_BMP: Tensor | None,
    gradient_factor: float | Tensor,
) -> Tensor:
    """The summed squared error of each patch times `inverse_total`: fp32 [B·M].

    All tensors contiguous. `channels`: mean and 1/std in the image's own units. `eps` None: no normalisation of
    patches. Writes (prediction - target) · gradient_factor to `gradient_BMP`, where given. With counts both factors
    are tensors of one element.
    """
    rows, (_, _, H, W) = masked_BM.numel(), image_BCHW.shape
    block = triton.next_power_of_2(3 * patch_size**2)
    rows_per_program = max(1, VALUES_PER_WARP // block)
    loss_R = torch.empty(rows, device=prediction_BMP.device)
    _loss_kernel[(triton.cdiv(rows, rows_per_program),)](
        image_BCHW,
        prediction_BMP,
        masked_BM,
        masked_BM if counts_B is None else counts_B,
        inverse_total,
        gradient_factor,
        loss_R,
        loss_R if gradient_BMP is None else gradient_BMP,
        rows,
        masked_BM.shape[1],
        (H // patch_size) * (W // patch_size),
        W // patch_size,
        W,
        H * W,
        *channels[0],
        *channels[1],
        0.0 if eps is None else eps,
        PATCH=patch_size,
        ROWS=rows_per_program,
        BLOCK=block,
        RAGGED=counts_B is not None,
        NORMALIZE=eps is not None,
        GRADIENT=gradient_BMP is not None,
        num_warps=max(1, block // VALUES_PER_WARP),
    )
    return loss_R


def scale_(gradient: Tensor, scale: Tensor) -> None:
    """gradient *= scale (fp32, one element), in place; reads and writes nothing where scale is 1."""
    _scale_kernel[(triton.cdiv(gradient.numel(), SCALE_BLOCK),)](gradient, scale, gradient.numel(), BLOCK=SCALE_BLOCK)
