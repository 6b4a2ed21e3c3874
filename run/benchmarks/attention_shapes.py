"""The model's calls of attention: those that the benchmark times, and the table names backends for.

Dimension letters: N tokens, D head dimension.
"""

from collections.abc import Iterable
from typing import NamedTuple

from mug.model.captioning import FUNCTIONS
from mug.model.objectives.mug import MUGConfig
from mug.model.presets import resolve


class Call(NamedTuple):
    """A call of attention. queries, keys: max of a sequence; packed: shorter sequences are laid end to end."""

    queries: int
    keys: int
    heads: int
    head_dim: int
    causal: bool
    packed: bool


def training_calls(config: MUGConfig) -> list[Call]:
    """Returns what pre-training runs forward and backward, and evaluation forward; each kind once, for a `config`."""
    image, text = 1 + config.visible, config.text_length
    causal = config.captioning == "autoregressive"
    heads, width = config.text_heads, config.text_width // config.text_heads
    calls = [
        _dense(image, config.heads, config.width),
        _dense(1 + config.patches, config.pixel_heads, config.pixel_width),
    ]
    calls.append(Call(text, text, heads, width, causal, packed=True))
    if config.text_cross_layers:
        calls.append(Call(text, image, heads, width, causal=False, packed=True))
    return calls


def whole_image_call(config: MUGConfig) -> Call:
    """Returns the encoder's calls on all patches: fine-tuning forward and backward, and frozen features forward."""
    return _dense(1 + config.patches, config.heads, config.width)


def preset_calls(presets: Iterable[str] = ("base", "large", "huge", "small", "tiny")) -> list[Call]:
    """Returns every call of the presets with either captioning, once; full images after all of pre-training."""
    configs = [resolve(MUGConfig(preset, captioning=kind)) for preset in presets for kind in FUNCTIONS]
    calls = [call for config in configs for call in training_calls(config)]
    return list(dict.fromkeys([*calls, *map(whole_image_call, configs)]))


def _dense(N: int, heads: int, width: int) -> Call:
    return Call(N, N, heads, width // heads, causal=False, packed=False)
