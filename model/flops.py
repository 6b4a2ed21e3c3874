"""Floating-point operations of one sample, counted from the configuration.

Convention: 1 multiply-add = 2 FLOP, backward = 2 x forward, causal attention counted as half; norms, softmax and
element-wise work are left out.
"""

from collections.abc import Iterable

from mug.model.presets import ModelConfig

DECODING = {"pixels": ("pixel_decoder",), "caption": ("text_decoder", "caption_head")}  # stages of one loss alone


def flops_per_sample(
    config: ModelConfig, vocabulary_size: int, text_tokens: float | None = None, terms: Iterable[str] = tuple(DECODING)
) -> dict[str, float]:
    """FLOP of forward and backward, by stage: encoder, pixel_decoder, text_decoder, caption_head.

    Args:
        text_tokens: of a caption, as padding costs nothing; None: a caption that fills the model's text length, as
            in published figures.
        terms: the losses that are computed; the stages of others are left out.
    """
    text_tokens = config.text_length if text_tokens is None else text_tokens
    multiply_adds = {
        "encoder": _encoder(config),
        "pixel_decoder": _pixel_decoder(config),
        "text_decoder": _text_decoder(config, text_tokens),
        "caption_head": text_tokens * config.text_width * vocabulary_size,
    }
    computed = {"encoder"}.union(*(DECODING[term] for term in terms))
    return {stage: 3 * 2 * count for stage, count in multiply_adds.items() if stage in computed}


def classifier_flops(config: ModelConfig, classes: int) -> float:
    """FLOP of forward and backward of the encoder on a whole image, and a linear layer on its features."""
    blocks = config.depth * _block(1 + config.patches, config.width)
    return 3 * 2 * (config.patches * config.patch_values * config.width + blocks + config.width * classes)


def _block(tokens: float, width: int, causal: bool = False) -> float:
    """Multiply-adds of qkv, proj and an MLP of 4 x width (12 width²), and of attention's two products."""
    return 12 * width**2 * tokens + 2 * tokens**2 * width * (0.5 if causal else 1)


def _encoder(config: ModelConfig) -> float:
    embed = config.visible * config.patch_values * config.width
    return embed + config.depth * _block(1 + config.visible, config.width)


def _pixel_decoder(config: ModelConfig) -> float:
    embed = (1 + config.visible) * config.width * config.pixel_width
    predict = (config.patches - config.visible) * config.pixel_width * config.patch_values
    return embed + predict + config.pixel_depth * _block(1 + config.patches, config.pixel_width)


def _text_decoder(config: ModelConfig, T: float) -> float:
    D, L = config.text_width, 1 + config.visible
    causal = config.captioning == "autoregressive"
    layers = config.text_unimodal_layers + config.text_cross_layers
    cross = 2 * D**2 * T + 2 * L * config.width * D + 2 * T * L * D  # q and proj, k and v, two products
    return layers * _block(T, D, causal) + config.text_cross_layers * cross
