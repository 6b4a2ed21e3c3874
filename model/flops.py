"""Floating-point operations of one sample, counted from the configuration.

Convention: 1 multiply-add = 2 FLOP, backward = 2 x forward, causal attention counted as half; norms, softmax and
element-wise work are left out.
"""

from collections.abc import Sequence
from itertools import pairwise

from mug.model.presets import EncoderConfig, PixelDecoderConfig, TextDecoderConfig

TRAINING = 3 * 2  # FLOP of forward and backward, a multiply-add


def encoder(config: EncoderConfig) -> float:
    """Returns the FLOP of the encoder on the patches that it sees in training."""
    tokens = 1 + config.visible
    embed = linear(config.visible, config.patch_values, config.width)
    return embed + blocks(config.width, config.depth, tokens, tokens**2)


def pixel_decoder(config: PixelDecoderConfig) -> float:
    """Returns the FLOP of the pixel decoder, whose head predicts only the masked patches."""
    tokens = 1 + config.patches
    embed = linear(1 + config.visible, config.width, config.pixel_width)
    predict = linear(config.patches - config.visible, config.pixel_width, config.patch_values)
    return embed + predict + blocks(config.pixel_width, config.pixel_depth, tokens, tokens**2)


def text_decoder(config: TextDecoderConfig, tokens: float, memory: int, causal: bool = True) -> float:
    """Returns the FLOP of the text decoder, without its head, on a caption of `tokens` and `memory` image tokens."""
    layers = config.text_unimodal_layers + config.text_cross_layers
    cross = cross_attention(tokens, memory, config.text_width, config.width)
    return text_blocks(config.text_width, layers, tokens, causal) + config.text_cross_layers * cross


def text_blocks(width: int, depth: int, tokens: float, causal: bool) -> float:
    """Returns the FLOP of blocks that see only text."""
    return blocks(width, depth, tokens, tokens**2 * (0.5 if causal else 1))


def cross_attention(queries: float, memory: float, width: int, memory_width: int) -> float:
    """Returns the FLOP of `queries` states of `width` that attend to `memory` states of `memory_width`."""
    # q and proj, k and v, two products
    return TRAINING * width * (2 * width * queries + 2 * memory_width * memory + 2 * queries * memory)


def blocks(width: int, depth: int, tokens: float, pairs: float) -> float:
    """Returns the FLOP of blocks in which so many pairs of a query and a key see each other: of qkv, proj and an MLP of
    4 x width (12 width²), and of attention's two products."""
    return TRAINING * depth * (12 * width**2 * tokens + 2 * pairs * width)


def linear(rows: float, width: int, outputs: int) -> float:
    """Returns the FLOP of a linear layer: a head over the vocabulary, a projection, a classifier."""
    return TRAINING * rows * width * outputs


def mlp(rows: float, widths: Sequence[int]) -> float:
    """Returns the FLOP of linear layers in a row, such as a projection head."""
    return sum(linear(rows, before, after) for before, after in pairwise(widths))
