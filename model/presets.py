"""Sizes of the parts that objectives are made of, and the presets they come from.

An objective's `Config` inherits those of its parts: the fields share a namespace, and `--model.width` is the encoder's
in every recipe.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

FROM_PRESET: Any = None  # of a size: `resolve` replaces it before any part of a model reads it


class ModelConfigError(ValueError):
    """A model setting that cannot be built; one line that names it and the fix."""


@dataclass(frozen=True)
class Vocabulary:
    """The properties of a tokenizer that a model needs: its size and the ids of its special tokens, among them one of
    each language where it has several."""

    size: int
    pad: int
    bos: int
    eos: int
    mask: int | None
    languages: tuple[str, ...] = ()
    language_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the vision encoder; None takes the preset's value.

    Args:
        preset: tiny, small, base, large or huge.
        image_size: side of the square image, in pixels.
        patch_size: side of a patch, in pixels.
        width: encoder width.
        depth: encoder blocks.
        heads: encoder attention heads.
    """

    own_sizes: ClassVar[dict[str, dict[str, Any]]] = {}  # by preset, what differs from PRESETS or is not there

    preset: str = "tiny"
    image_size: int = FROM_PRESET
    patch_size: int = FROM_PRESET
    width: int = FROM_PRESET
    depth: int = FROM_PRESET
    heads: int = FROM_PRESET

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """N, patches of an image."""
        return self.grid**2

    @property
    def patch_values(self) -> int:
        """P, values of a patch."""
        return self.patch_size**2 * 3

    @property
    def visible(self) -> int:
        """K, patches that the encoder sees in training: all, unless some are masked."""
        return self.patches

    def check(self) -> None:
        """Raise ModelConfigError where sizes, all of them set, do not fit together."""
        at_least(self, 1, "image_size", "patch_size", "width", "depth", "heads")
        if self.image_size % self.patch_size:
            nearest = round(self.image_size / self.patch_size) * self.patch_size or self.patch_size
            raise ModelConfigError(
                f"model.image_size {self.image_size} is not a multiple of model.patch_size {self.patch_size};"
                f" {nearest} is"
            )
        check_heads(self, "")
        check_sincos(self, "")


@dataclass(frozen=True)
class TunedEncoderConfig(EncoderConfig):
    """Sizes of an encoder that is trained end to end for a task.

    Args:
        preset: tiny, small, base, large or huge.
        drop_path: rate of stochastic depth in the last block; it rises linearly from 0 at the first.
        norm_eps: of the layer norms, as the weights of `init` were trained with: 1e-6 in MAE and timm, 1e-12 in most
            of transformers.
    """

    preset: str = "base"
    drop_path: float = 0.1
    norm_eps: float = 1e-6

    def check(self) -> None:
        super().check()
        if not 0 <= self.drop_path < 1:
            raise ModelConfigError(f"model.drop_path must be at least 0 and less than 1, not {self.drop_path}")
        more_than_zero(self, "norm_eps")


@dataclass(frozen=True)
class MaskingConfig(EncoderConfig):
    """Sizes of an encoder that sees a part of the patches in training.

    Args:
        mask_ratio: share of the patches hidden from the encoder.
    """

    mask_ratio: float = 0.75

    @property
    def visible(self) -> int:
        return int(self.patches * (1 - self.mask_ratio))

    def check(self) -> None:
        super().check()
        between_0_and_1(self, "mask_ratio")
        if not 0 < self.visible < self.patches:
            raise ModelConfigError(
                f"model.mask_ratio {self.mask_ratio} leaves {self.visible} of {self.patches} patches visible;"
                " at least one must be visible and one masked"
            )


@dataclass(frozen=True)
class PixelDecoderConfig(MaskingConfig):
    """Sizes of a decoder that regresses the masked patches.

    Args:
        pixel_width: pixel decoder width.
        pixel_depth: pixel decoder blocks.
        pixel_heads: pixel decoder attention heads.
        normalize_patches: regress each patch less its mean, over its standard deviation.
    """

    pixel_width: int = FROM_PRESET
    pixel_depth: int = FROM_PRESET
    pixel_heads: int = FROM_PRESET
    normalize_patches: bool = True

    def check(self) -> None:
        super().check()
        at_least(self, 1, "pixel_width", "pixel_depth", "pixel_heads")
        check_heads(self, "pixel_")
        check_sincos(self, "pixel_")


@dataclass(frozen=True)
class TextConfig(EncoderConfig):
    """Sizes of the text blocks.

    Args:
        text_width: width of the text blocks.
        text_heads: their attention heads.
        text_length: tokens of a caption, BOS and EOS included.
    """

    text_width: int = FROM_PRESET
    text_heads: int = FROM_PRESET
    text_length: int = FROM_PRESET

    def check(self) -> None:
        super().check()
        at_least(self, 1, "text_width", "text_heads")
        at_least(self, 2, "text_length")  # a caption has BOS and EOS
        check_heads(self, "text_")


@dataclass(frozen=True)
class TextDecoderConfig(TextConfig):
    """Sizes of a decoder that writes the caption (CoCa, arXiv 2205.01917).

    Args:
        text_unimodal_layers: text blocks that see only text.
        text_cross_layers: text blocks that also attend to the encoder's output.
        tied_head: one matrix for token embedding and caption head.
    """

    text_unimodal_layers: int = FROM_PRESET
    text_cross_layers: int = FROM_PRESET
    tied_head: bool = True

    def check(self) -> None:
        super().check()
        at_least(self, 0, "text_unimodal_layers", "text_cross_layers")
        if self.text_unimodal_layers + self.text_cross_layers == 0:
            raise ModelConfigError("the text decoder needs at least one layer: raise model.text_cross_layers")


Config = TypeVar("Config", bound=EncoderConfig)


def at_least(config: Any, minimum: int, *names: str) -> None:
    """Raise ModelConfigError if a number of these names is below the minimum."""
    for name in names:
        if getattr(config, name) < minimum:
            raise ModelConfigError(f"model.{name} must be at least {minimum}, not {getattr(config, name)}")


def more_than_zero(config: Any, *names: str) -> None:
    """Raise ModelConfigError unless the numbers of these names are positive."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ModelConfigError(f"model.{name} must be more than 0, not {getattr(config, name)}")


def between_0_and_1(config: Any, name: str) -> None:
    """Raise ModelConfigError unless the number of this name lies between 0 and 1."""
    if not 0 < getattr(config, name) < 1:
        raise ModelConfigError(f"model.{name} must lie between 0 and 1, not be {getattr(config, name)}")


def check_heads(config: Any, part: str) -> None:
    """Raise ModelConfigError unless the width of a part, by its prefix, divides into its heads."""
    width, heads = getattr(config, part + "width"), getattr(config, part + "heads")
    if width % heads:
        raise ModelConfigError(f"model.{part}width {width} is not a multiple of model.{part}heads {heads}")


def check_sincos(config: Any, part: str) -> None:
    """Raise ModelConfigError unless 2-D sin-cos positions have the width of a part, by its prefix."""
    if (width := getattr(config, part + "width")) % 4:
        raise ModelConfigError(f"model.{part}width {width} must be a multiple of 4 (2-D sin-cos positions)")


def _sizes(
    image_and_patch: tuple, encoder: tuple, pixel: tuple, text: tuple, towers: tuple, predictor: tuple
) -> dict[str, int]:
    """(image, patch), (width, depth, heads) twice, (width, heads, uni-modal, cross, length), (layers of a text encoder,
    width of a joint embedding), (width, depth) of a predictor as fields."""
    names = "image_size patch_size width depth heads pixel_width pixel_depth pixel_heads text_width text_heads"
    names += " text_unimodal_layers text_cross_layers text_length text_layers embedding_width"
    names += " predictor_width predictor_depth"
    return dict(zip(names.split(), (*image_and_patch, *encoder, *pixel, *text, *towers, *predictor), strict=True))


# Encoders S, B, L, H as ViT (arXiv 2010.11929) and the 512 x 8 pixel decoder as MAE have them; the text
# decoder's 6 + 6 layers at width 768 follow CoCa. The paper states none of the decoder depths. A text encoder's layers
# and the joint embedding are CLIP's (arXiv 2103.00020, table 19), at the width of the text decoder. The predictor is
# I-JEPA's (arXiv 2301.08243, appendix A.1).
PRESETS = {
    "tiny": _sizes((64, 8), (192, 4, 3), (256, 3, 8), (192, 3, 2, 2, 24), (4, 128), (96, 3)),
    "small": _sizes((224, 16), (384, 12, 6), (256, 4, 8), (384, 6, 3, 3, 64), (6, 256), (384, 6)),
    "base": _sizes((224, 16), (768, 12, 12), (512, 8, 16), (768, 12, 6, 6, 64), (12, 512), (384, 6)),
    "large": _sizes((224, 16), (1024, 24, 16), (512, 8, 16), (768, 12, 6, 6, 64), (12, 512), (384, 12)),
    "huge": _sizes((224, 14), (1280, 32, 16), (512, 8, 16), (768, 12, 6, 6, 64), (12, 512), (384, 12)),
}


def resolve(config: Config) -> Config:
    """Returns the configuration with every None filled from its preset, checked.

    Raises:
        ModelConfigError: an unknown preset, or sizes that do not fit together.
    """
    presets = {name: PRESETS.get(name, {}) | config.own_sizes.get(name, {}) for name in PRESETS | config.own_sizes}
    if config.preset not in presets:
        raise ModelConfigError(f"model.preset {config.preset!r} is not one of {', '.join(presets)}")
    preset = presets[config.preset]
    names = {field.name for field in dataclasses.fields(config)}
    missing = {name: preset[name] for name in names & preset.keys() if getattr(config, name) is None}
    config = dataclasses.replace(config, **missing)
    config.check()
    return config
