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
    embed = config.visible * config.patch_values * config.width
    return TRAINING * (embed + config.depth * _block(1 + config.visible, config.width))


def pixel_decoder(config: PixelDecoderConfig) -> float:
    """Returns the FLOP of the pixel decoder, whose head predicts only the masked patches."""
    embed = (1 + config.visible) * config.width * config.pixel_width
    predict = (config.patches - config.visible) * config.pixel_width * config.patch_values
    blocks = config.pixel_depth * _block(1 + config.patches, config.pixel_width)
    return TRAINING * (embed + predict + blocks)


def text_decoder(config: TextDecoderConfig, tokens: float, memory: int, causal: bool = True) -> float:
    """Returns the FLOP of the text decoder, without its head, on a caption of `tokens` and `memory` image tokens."""
    layers = config.text_unimodal_layers + config.text_cross_layers
    cross = cross_attention(tokens, memory, config.text_width, config.width)
    return text_blocks(config.text_width, layers, tokens, causal) + config.text_cross_layers * cross


def text_blocks(width: int, depth: int, tokens: float, causal: bool) -> float:
    """Returns the FLOP of blocks that see only text."""
    return TRAINING * depth * _block(tokens, width, causal)


def cross_attention(queries: float, memory: float, width: int, memory_width: int) -> float:
    """Returns the FLOP of `queries` states of `width` that attend to `memory` states of `memory_width`."""
    # q and proj, k and v, two products
    return TRAINING * width * (2 * width * queries + 2 * memory_width * memory + 2 * queries * memory)


def blocks(width: int, depth: int, tokens: float, pairs: float) -> float:
    """Returns the FLOP of blocks in which so many pairs of a query and a key see each other."""
    return TRAINING * depth * (12 * width**2 * tokens + 2 * pairs * width)


def linear(rows: float, width: int, outputs: int) -> float:
    """Returns the FLOP of a linear layer: a head over the vocabulary, a projection, a classifier."""
    return TRAINING * rows * width * outputs


def mlp(rows: float, widths: Sequence[int]) -> float:
    """Returns the FLOP of linear layers in a row, such as a projection head."""
    return sum(linear(rows, before, after) for before, after in pairwise(widths))


def _block(tokens: float, width: int, causal: bool = False) -> float:
    """Returns the multiply-adds of qkv, proj and an MLP of 4 x width (12 width²), and of attention's two products."""
    return 12 * width**2 * tokens + 2 * tokens**2 * width * (0.5 if causal else 1)
