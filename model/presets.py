"""Sizes of the model. No torch here: the command line is parsed before torch is imported."""

import dataclasses
from dataclasses import dataclass

CAPTIONING = ("autoregressive", "masked-language")


class ModelConfigError(ValueError):
    """A model setting that cannot be built; one line that names it and the mend."""


@dataclass(frozen=True)
class Vocabulary:
    """What the model needs of a tokenizer: its size and the ids of its special tokens."""

    size: int
    pad: int
    bos: int
    eos: int
    mask: int | None


@dataclass(frozen=True)
class ModelConfig:
    """MUG's sizes; None takes the preset's value.

    Args:
        preset: tiny, small, base, large or huge.
        image_size: side of the square image, in pixels.
        patch_size: side of a patch, in pixels.
        width: encoder width.
        depth: encoder blocks.
        heads: encoder attention heads.
        pixel_width: pixel decoder width.
        pixel_depth: pixel decoder blocks.
        pixel_heads: pixel decoder attention heads.
        text_width: text decoder width.
        text_heads: text decoder attention heads.
        text_unimodal_layers: text blocks that see text alone.
        text_cross_layers: text blocks that also attend to the encoder's output.
        text_length: tokens of a caption, BOS and EOS included.
        tied_head: one matrix for token embedding and caption head.
        captioning: autoregressive, or masked-language (BERT's objective, conditioned on the image).
        mask_ratio: share of the patches hidden from the encoder.
        normalize_patches: regress each patch less its mean, over its standard deviation.
    """

    preset: str = "tiny"
    image_size: int | None = None
    patch_size: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    pixel_width: int | None = None
    pixel_depth: int | None = None
    pixel_heads: int | None = None
    text_width: int | None = None
    text_heads: int | None = None
    text_unimodal_layers: int | None = None
    text_cross_layers: int | None = None
    text_length: int | None = None
    tied_head: bool = True
    captioning: str = "autoregressive"
    mask_ratio: float = 0.75
    normalize_patches: bool = True

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """N, patches of an image."""
        return self.grid**2

    @property
    def visible(self) -> int:
        """K, patches that the encoder sees in training."""
        return int(self.patches * (1 - self.mask_ratio))

    @property
    def patch_values(self) -> int:
        """P, values of a patch."""
        return self.patch_size**2 * 3


def _sizes(image_and_patch: tuple, encoder: tuple, pixel: tuple, text: tuple) -> dict[str, int]:
    """(image, patch), (width, depth, heads) twice, (width, heads, uni-modal, cross, length) as fields."""
    names = "image_size patch_size width depth heads pixel_width pixel_depth pixel_heads text_width text_heads"
    names += " text_unimodal_layers text_cross_layers text_length"
    return dict(zip(names.split(), (*image_and_patch, *encoder, *pixel, *text), strict=True))


# Encoders S, B, L, H as ViT (arXiv 2010.11929) and the 512 x 8 pixel decoder as MAE have them; the text
# decoder's 6 + 6 layers at width 768 follow CoCa. The paper states none of the decoder depths.
PRESETS = {
    "tiny": _sizes((64, 8), (192, 4, 3), (256, 3, 8), (192, 3, 2, 2, 24)),
    "small": _sizes((224, 16), (384, 12, 6), (256, 4, 8), (384, 6, 3, 3, 64)),
    "base": _sizes((224, 16), (768, 12, 12), (512, 8, 16), (768, 12, 6, 6, 64)),
    "large": _sizes((224, 16), (1024, 24, 16), (512, 8, 16), (768, 12, 6, 6, 64)),
    "huge": _sizes((224, 14), (1280, 32, 16), (512, 8, 16), (768, 12, 6, 6, 64)),
}


def resolve(config: ModelConfig) -> ModelConfig:
    """The configuration with every None filled from its preset, checked.

    Raises:
        ModelConfigError: an unknown preset, or sizes that do not fit together.
    """
    if config.preset not in PRESETS:
        raise ModelConfigError(f"model.preset {config.preset!r} is not one of {', '.join(PRESETS)}")
    preset = PRESETS[config.preset]
    missing = {name: value for name, value in preset.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **missing)
    _check(config)
    return config


def _check(config: ModelConfig) -> None:
    least = {"text_unimodal_layers": 0, "text_cross_layers": 0, "text_length": 2}  # a caption has BOS and EOS
    for name in PRESETS["base"]:
        if getattr(config, name) < least.get(name, 1):
            raise ModelConfigError(f"model.{name} must be at least {least.get(name, 1)}, not {getattr(config, name)}")
    if config.image_size % config.patch_size:
        nearest = round(config.image_size / config.patch_size) * config.patch_size or config.patch_size
        raise ModelConfigError(
            f"model.image_size {config.image_size} is not a multiple of model.patch_size {config.patch_size};"
            f" {nearest} is"
        )
    for part in ("", "pixel_", "text_"):
        width, heads = getattr(config, part + "width"), getattr(config, part + "heads")
        if width % heads:
            raise ModelConfigError(f"model.{part}width {width} is not a multiple of model.{part}heads {heads}")
        if part != "text_" and width % 4:
            raise ModelConfigError(f"model.{part}width {width} must be a multiple of 4 (2-D sin-cos positions)")
    if not 0 < config.mask_ratio < 1:
        raise ModelConfigError(f"model.mask_ratio must lie between 0 and 1, not be {config.mask_ratio}")
    if not 0 < config.visible < config.patches:
        raise ModelConfigError(
            f"model.mask_ratio {config.mask_ratio} leaves {config.visible} of {config.patches} patches visible;"
            " at least one must be visible and one masked"
        )
    if config.captioning not in CAPTIONING:
        raise ModelConfigError(f"model.captioning {config.captioning!r} is not one of {', '.join(CAPTIONING)}")
    if config.text_unimodal_layers + config.text_cross_layers == 0:
        raise ModelConfigError("the text decoder needs at least one layer: raise model.text_cross_layers")
