"""Colours of views, on the device and over the batch: jitter, grey, blur, solarize (SimCLR, arXiv 2002.05709, A).

Each choice is a function of (seed, position, view). The results are those of torchvision's functions on floating
images, with a factor for each sample; nothing waits for the device. Dimension letters: B batch, C channels, S side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mug.model.keyed_random import random_bits
from mug.model.objectives.objective import View

PURPOSE = 128  # of keyed_random, plus the number of the view
JITTERS = 4  # brightness, contrast, saturation, hue
HUE = 3  # the number of the last
SIGMA = 0.1, 2.0  # min and max deviation of the blur in images of BLURRED_SIDE pixels; in proportion in others
BLURRED_SIDE = 224
SOLARIZED_FROM = 0.5


def augment_views(views_BVCSS: Tensor, views: Sequence[View], seed: int, position_B: Tensor) -> list[Tensor]:
    """Returns each view, fp32 [B, 3, S, S] in 0..1, of uint8 [B, V, 3, S, S]."""
    return [augment(views_BVCSS[:, v], view, seed, position_B, v) for v, view in enumerate(views)]


def augment(image_BCSS: Tensor, view: View, seed: int, position_B: Tensor, number: int = 0) -> Tensor:
    """Returns the images in the colours of `view`, the `number`-th of its sample; see `augment_views`."""
    u_BN = random_bits(seed, PURPOSE + number, position_B, 2 * JITTERS + 5).double() * 2.0**-63
    order_B4, (sigma_B, *chosen) = u_BN[:, :JITTERS].argsort(1), u_BN[:, 2 * JITTERS :].unbind(1)
    shares = view.jitter_share, view.grey, view.blur, view.solarize
    jittered_B, grey_B, blurred_B, solarized_B = (u_B < share for u_B, share in zip(chosen, shares, strict=True))
    x = image_BCSS.float() / 255
    if any(view.jitter):
        factor_B4 = jitter_factors(view.jitter, u_BN[:, JITTERS : 2 * JITTERS].float())
        x = _where(jittered_B, jitter(x, order_B4, factor_B4), x)
    if view.grey:
        x = _where(grey_B, grey(x), x)
    if view.blur:
        sigma_B = SIGMA[0] + sigma_B.float() * (SIGMA[1] - SIGMA[0])
        x = _where(blurred_B, blur(x, sigma_B * x.shape[-1] / BLURRED_SIDE), x)
    if view.solarize:
        x = _where(solarized_B, solarize(x), x)
    return x


def jitter_factors(change: Sequence[float], u_B4: Tensor) -> Tensor:
    """Returns [B, 4] of uniform [0, 1): factors of brightness, contrast and saturation around 1, and turns of hue."""
    low = [max(1 - part, 0.0) for part in change[:HUE]] + [-change[HUE]]
    high = [1 + part for part in change[:HUE]] + [change[HUE]]
    return torch.stack([a + u_B * (b - a) for a, b, u_B in zip(low, high, u_B4.unbind(1), strict=True)], 1)


def jitter(x_BCSS: Tensor, order_B4: Tensor, factor_B4: Tensor) -> Tensor:
    """Returns the images after the four jitters in each sample's own order.

    Args:
        order_B4: int64, a permutation of brightness 0, contrast 1, saturation 2, hue 3: which comes first, second …
        factor_B4: by the number of the jitter.
    """
    for which_B in order_B4.unbind(1):
        factor_B111 = factor_B4.gather(1, which_B[:, None])[..., None, None]
        grey_B1SS = grey(x_BCSS)
        base_B1SS = _where(which_B == 1, grey_B1SS.mean((1, 2, 3), keepdim=True), grey_B1SS)
        base_B1SS = base_B1SS * (which_B != 0)[:, None, None, None]  # black
        blend = (x_BCSS * factor_B111 + base_B1SS * (1 - factor_B111)).clamp(0, 1)
        x_BCSS = _where(which_B == HUE, turn_hue(x_BCSS, factor_B4[:, HUE]), blend)
    return x_BCSS


def grey(x_BCSS: Tensor) -> Tensor:
    """Returns the luma [B, 1, S, S] of ITU-R BT.601."""
    red, green, blue = x_BCSS.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def turn_hue(x_BCSS: Tensor, turns_B: Tensor) -> Tensor:
    """Returns the images with their hue turned by `turns_B` of the circle of colours, in HSV."""
    red, green, blue = x_BCSS.unbind(1)
    value, low = x_BCSS.amax(1), x_BCSS.amin(1)
    chroma = value - low
    part = chroma.where(chroma > 0, 1.0)
    sixths = torch.where(
        value == red,
        (green - blue) / part,
        torch.where(value == green, 2 + (blue - red) / part, 4 + (red - green) / part),
    )
    sixths = sixths + 6 * turns_B[:, None, None]
    # Of a channel, how far the hue is from where it is least: 0 to 1 of the chroma is taken away.
    away = ((sixths + offset) % 6 for offset in (5, 3, 1))
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in away], 1)


def blur(x_BCSS: Tensor, sigma_B: Tensor) -> Tensor:
    """Returns the images under a Gaussian of the deviation `sigma_B`, of S // 10 pixels or one more, edges reflected.

    A product with one matrix for the rows and one for the columns, faster than a convolution for each sample.
    """
    S = x_BCSS.shape[-1]
    radius = S // 20
    offset_K, place_S = (torch.arange(n, device=x_BCSS.device) for n in (2 * radius + 1, S))
    offset_K = offset_K - radius
    weight_BK = (-0.5 * (offset_K / sigma_B[:, None]).square()).exp()
    weight_BK = weight_BK / weight_BK.sum(1, keepdim=True)
    source_KS = (place_S + offset_K[:, None]).abs()  # reflected at the first pixel, and then at the last
    source_KS = S - 1 - (S - 1 - source_KS).abs()
    taken_KSS = (source_KS[..., None] == place_S).to(x_BCSS.dtype)
    matrix_B1SS = (weight_BK @ taken_KSS.flatten(1)).view(-1, 1, S, S)
    return matrix_B1SS @ x_BCSS @ matrix_B1SS.transpose(2, 3)


def solarize(x_BCSS: Tensor) -> Tensor:
    """Returns the images with what is as bright as the threshold inverted."""
    return torch.where(x_BCSS >= SOLARIZED_FROM, 1 - x_BCSS, x_BCSS)


def _where(chosen_B: Tensor, x: Tensor, other: Tensor) -> Tensor:
    return torch.where(chosen_B[:, None, None, None], x, other)
