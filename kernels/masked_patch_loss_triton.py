"""Triton kernels of masked_patch_loss; imported at first use, as Triton may be absent.

Roofline at batch 256, 224 px, patch 16, 75% masked, bf16, on an H200: prediction and pixels are read once and the
gradient is written once, 145 MB, 34 µs at 4.3 TB/s. Each of the 528 schedulers has 71 patches, so memory is the bound
only while a warp spends well under 850 instructions on a patch (34 µs at 1.8 GHz; some issue at half rate). Hence:

- A program loops over patches: offsets, masks and constants are made once. Index and prediction of the next patch are
  loaded while this one is computed.
- A patch is cut into groups of a few pixels. One lane holds all values of a group (three a pixel), as three tiles: its
  thirds. So the register alone decides which pixel of the group and which channel a value is of; the compiler knows
  both, offsets become part of the load, and the constants of a channel are one scalar instead of one a value.
- Prediction and gradient, four fifths of the bytes, move a third at a time: 16 bytes, 8 with patch 14. uint8 pixels are
  read as words, a channel of a group each. Floating pixels, and those of patch 14, whose rows do not begin on a word's
  bound, are read one by one: few 32-byte sectors, which L1 keeps until all are used.
- Subtracting a mean and dividing by a standard deviation is one FMA, for the channel and for the patch.

docs/kernels.md has what this compiles to: instructions a patch and registers.

Dimension letters: R patches of one turn of the loop, G groups of a patch, Q pixels of a group = values of a third.
Tensors of the kernel are [R, G, Q], with 1 where a dimension does not matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS_PER_SM = 16  # resident with up to 128 registers; their next predictions are 24 kB in flight on each SM
PROGRAMS_IN_INTERPRETER = 3  # few, so that each goes around its loop
WORDS = {4: tl.int32, 8: tl.int64}  # of so many uint8 pixels
SCALE_BLOCK = 8192


@triton.jit(do_not_specialize=["rows"])
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
    stride,
    plane,
    scale_0,
    scale_1,
    scale_2,
    shift_0,
    shift_1,
    shift_2,
    eps,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    PIXELS: tl.constexpr,
    WORDS: tl.constexpr,
    RAGGED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    P: tl.constexpr = 3 * PATCH * PATCH
    unit: tl.constexpr = PIXELS if WORDS else 1  # pixels of an element of the image; stride and plane count elements
    group = tl.arange(0, GROUPS)[None, :, None]
    exists = group * PIXELS < PATCH * PATCH
    value = tl.arange(0, PIXELS)[None, None, :]
    values = (value, value + PIXELS, value + 2 * PIXELS)  # of each third, their place in the group
    place = group * (3 * PIXELS) + value
    scales, shifts = (scale_0, scale_1, scale_2), (shift_0, shift_1, shift_2)
    loss_factor, error_factor = inverse_total, gradient_factor
    if RAGGED:
        loss_factor, error_factor = tl.load(inverse_total), tl.load(gradient_factor)

    first, step = tl.program_id(0) * ROWS, tl.num_programs(0) * ROWS
    row = first + tl.arange(0, ROWS)[:, None, None]
    index = tl.load(masked + row, mask=row < rows, other=0)
    predicted = _load_thirds(prediction + (row.to(tl.int64) * P + place), exists & (row < rows), PIXELS)
    for _ in range(first, rows, step):
        sample, real = (row // M).to(tl.int64), row < rows
        counted = real
        if RAGGED:
            counted = real & (row % M < tl.load(counts + sample, mask=real, other=0))
        inside = (index >= 0) & (index < patches)
        index = tl.where(inside, index, 0).to(tl.int32)
        corner = image + sample * 3 * plane + (index // columns * PATCH * stride + index % columns * (PATCH // unit))
        x = _load_pixels(corner, group, values, exists & counted, stride, plane, PATCH, PIXELS, WORDS)

        next_row = row + step
        next_index = tl.load(masked + next_row, mask=next_row < rows, other=0)
        next_place = next_row.to(tl.int64) * P + place
        next_predicted = _load_thirds(prediction + next_place, exists & (next_row < rows), PIXELS)

        x = _scale_and_shift(x, values, scales, shifts, exists)
        inverse_std = 1.0
        if NORMALIZE:
            x = _center(x, exists, P)
            x = _center(x, exists, P)  # again: rounding of the mean, over sqrt(eps), would show on a flat patch
            inverse_std = 1.0 / tl.sqrt_rn(_sum_of_squares(x) / (P - 1) + eps)
        error = _errors(predicted, x, tl.where(inside, inverse_std, float("nan")), exists & counted)
        tl.store(loss + row, _sum_of_squares(error) * loss_factor, mask=real)
        if GRADIENT:
            _store_thirds(gradient + (row.to(tl.int64) * P + place), error, error_factor, exists & real, PIXELS)
        row, index, predicted = next_row, next_index, next_predicted


@triton.jit
def _load_thirds(pointer, mask, PIXELS: tl.constexpr):
    first = tl.load(pointer, mask=mask, other=0.0)
    second = tl.load(pointer + PIXELS, mask=mask, other=0.0)
    third = tl.load(pointer + 2 * PIXELS, mask=mask, other=0.0)
    return first, second, third


@triton.jit
def _store_thirds(pointer, x, factor, mask, PIXELS: tl.constexpr):
    tl.store(pointer, x[0] * factor, mask=mask)
    tl.store(pointer + PIXELS, x[1] * factor, mask=mask)
    tl.store(pointer + 2 * PIXELS, x[2] * factor, mask=mask)


@triton.jit
def _load_pixels(
    corner, group, values, mask, stride, plane, PATCH: tl.constexpr, PIXELS: tl.constexpr, WORDS: tl.constexpr
):
    if WORDS:
        pixel = group * PIXELS
        words = corner + (pixel // PATCH * stride + pixel % PATCH // PIXELS)
        red = tl.load(words, mask=mask, other=0)
        green = tl.load(words + plane, mask=mask, other=0)
        blue = tl.load(words + 2 * plane, mask=mask, other=0)
        x = (red, green, blue)
        return _unpack(x, values[0]), _unpack(x, values[1]), _unpack(x, values[2])
    first = _load_third_of_pixels(corner, group, values[0], mask, stride, plane, PATCH, PIXELS)
    second = _load_third_of_pixels(corner, group, values[1], mask, stride, plane, PATCH, PIXELS)
    third = _load_third_of_pixels(corner, group, values[2], mask, stride, plane, PATCH, PIXELS)
    return first, second, third


@triton.jit
def _load_third_of_pixels(corner, group, value, mask, stride, plane, PATCH: tl.constexpr, PIXELS: tl.constexpr):
    pixel = group * PIXELS + value // 3
    offset = value % 3 * plane + pixel // PATCH * stride + pixel % PATCH
    return tl.load(corner + offset, mask=mask, other=0).to(tl.float32)


@triton.jit
def _unpack(words, value):
    return (_of_channel(words, value) >> (value // 3 * 8) & 255).to(tl.int32).to(tl.float32)


@triton.jit
def _of_channel(x, value):
    return tl.where(value % 3 == 0, x[0], tl.where(value % 3 == 1, x[1], x[2]))


@triton.jit
def _scale_and_shift(x, values, scales, shifts, mask):
    first = tl.fma(x[0], _of_channel(scales, values[0]), _of_channel(shifts, values[0]))
    second = tl.fma(x[1], _of_channel(scales, values[1]), _of_channel(shifts, values[1]))
    third = tl.fma(x[2], _of_channel(scales, values[2]), _of_channel(shifts, values[2]))
    return tl.where(mask, first, 0.0), tl.where(mask, second, 0.0), tl.where(mask, third, 0.0)


@triton.jit
def _center(x, mask, P: tl.constexpr):
    mean = _sum(x[0] + x[1] + x[2]) / P
    return tl.where(mask, x[0] - mean, 0.0), tl.where(mask, x[1] - mean, 0.0), tl.where(mask, x[2] - mean, 0.0)


@triton.jit
def _errors(predicted, x, factor, mask):
    first = tl.fma(x[0], -factor, predicted[0].to(tl.float32))
    second = tl.fma(x[1], -factor, predicted[1].to(tl.float32))
    third = tl.fma(x[2], -factor, predicted[2].to(tl.float32))
    return tl.where(mask, first, 0.0), tl.where(mask, second, 0.0), tl.where(mask, third, 0.0)


@triton.jit
def _sum_of_squares(x):
    return _sum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2])


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def _scale_kernel(gradient, scale, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale)
    work = place < tl.where(factor == 1.0, 0, size)  # 1 moves no memory, and the host need not look
    tl.store(gradient + place, tl.load(gradient + place, mask=work).to(tl.float32) * factor, mask=work)


def tile(patch_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Returns the kernel's PATCH, ROWS, GROUPS, PIXELS and num_warps for a prediction's dtype: 24 values a lane."""
    pixels = 4 if patch_size % 8 or dtype == torch.float32 else 8  # a third of a group: 16 bytes, as far as rows allow
    groups = triton.next_power_of_2(patch_size**2 // pixels)
    rows, warps = max(1, 256 // (groups * pixels)), max(1, groups * pixels // 256)
    return {"PATCH": patch_size, "ROWS": rows, "GROUPS": groups, "PIXELS": pixels, "num_warps": warps}


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
    """Returns the summed squared error of each patch times `inverse_total`: fp32 [B·M].

    All tensors contiguous. `channels`: scale and shift that normalise the image's own units. `eps` None: no
    normalisation of patches. Writes (prediction - target) · gradient_factor to `gradient_BMP`, where given. With counts
    both factors are tensors of one element.
    """
    rows, (_, _, H, W) = masked_BM.numel(), image_BCHW.shape
    constants = tile(patch_size, prediction_BMP.dtype)
    pixels = constants["PIXELS"]
    words = image_BCHW.dtype == torch.uint8 and patch_size % pixels == 0 and image_BCHW.data_ptr() % pixels == 0
    unit = pixels if words else 1
    loss_R = torch.empty(rows, device=prediction_BMP.device)
    with torch.cuda.device_of(prediction_BMP):  # Triton launches on the current device
        _loss_kernel[(_programs(prediction_BMP.device, rows, constants),)](
            triton.reinterpret(image_BCHW, WORDS[pixels]) if words else image_BCHW,
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
            W // unit,
            H * W // unit,
            *channels[0],
            *channels[1],
            0.0 if eps is None else eps,
            WORDS=words,
            RAGGED=counts_B is not None,
            NORMALIZE=eps is not None,
            GRADIENT=gradient_BMP is not None,
            **constants,
        )
    return loss_R


def _programs(device: torch.device, rows: int, constants: dict[str, int]) -> int:
    """Returns as many programs as the GPU holds at a time, from the properties that PyTorch caches."""
    resident = PROGRAMS_IN_INTERPRETER
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        resident = properties.multi_processor_count * WARPS_PER_SM // constants["num_warps"]
    return min(triton.cdiv(rows, constants["ROWS"]), resident)


def scale_(gradient: Tensor, scale: Tensor) -> None:
    """gradient *= scale (fp32, one element), in place; reads and writes nothing where scale is 1."""
    programs, size = triton.cdiv(gradient.numel(), SCALE_BLOCK), gradient.numel()
    with torch.cuda.device_of(gradient):
        _scale_kernel[(programs,)](gradient, scale, size, BLOCK=SCALE_BLOCK)
