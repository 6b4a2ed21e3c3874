"""Presets are the published sizes, and a setting that cannot be built is named in one line."""

import dataclasses
import re
import subprocess
import sys

import pytest
import timm
import torch

from mug.model.encoder import Encoder
from mug.model.objectives.mug import MUGConfig
from mug.model.presets import PRESETS, ModelConfigError, resolve


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# The sizes of MUG that a preset gives.
SIZES = [field.name for field in dataclasses.fields(MUGConfig) if field.name in PRESETS["base"]]


@pytest.mark.parametrize(
    "preset, name, published",
    [
        ("base", "vit_base_patch16_224", 85.8),
        ("large", "vit_large_patch16_224", 303.3),
        ("huge", "vit_huge_patch14_224", 630.8),
    ],
)
def test_encoders_have_timms_parameters(preset, name, published):
    with torch.device("meta"):
        encoder = Encoder(resolve(MUGConfig(preset=preset)))
        oracle = timm.create_model(name, num_classes=0)
    del oracle.pos_embed
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (encoder, oracle)]
    assert shapes[0] == shapes[1]
    assert count(encoder) == count(oracle)
    assert pytest.approx(published, abs=1) == count(encoder) / 1e6


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_what_is_not_given(preset):
    config = resolve(MUGConfig(preset=preset, width=64, heads=4))
    assert (config.width, config.heads) == (64, 4)
    rest = {name: PRESETS[preset][name] for name in SIZES if name not in ("width", "heads")}
    assert {name: getattr(config, name) for name in rest} == rest
    assert resolve(config) == config


@pytest.mark.parametrize(
    "preset, patches, visible, values",
    [("tiny", 64, 16, 192), ("small", 196, 49, 768), ("base", 196, 49, 768), ("huge", 256, 64, 588)],
)
def test_patches(preset, patches, visible, values):
    config = resolve(MUGConfig(preset=preset))
    assert (config.patches, config.visible, config.patch_values) == (patches, visible, values)


POSITIVE = [name for name in SIZES if not name.endswith("_layers")]
WRONG = [
    ({"preset": "giant"}, "model.preset", "'giant' is not one of tiny, small, base, large, huge"),
    *[({name: 0}, f"model.{name}", "0") for name in POSITIVE],
    *[({name: -1}, f"model.{name}", "-1") for name in SIZES],
    ({"image_size": 100}, "model.image_size", "model.patch_size 8"),
    ({"image_size": 5}, "model.image_size", "8 is"),
    ({"patch_size": 7}, "model.image_size", "model.patch_size 7"),
    ({"heads": 5}, "model.width", "model.heads 5"),
    ({"pixel_heads": 3}, "model.pixel_width", "model.pixel_heads 3"),
    ({"text_heads": 7}, "model.text_width", "model.text_heads 7"),
    ({"width": 90}, "model.width", "multiple of 4"),
    ({"pixel_width": 30, "pixel_heads": 3}, "model.pixel_width", "multiple of 4"),
    *[({"mask_ratio": ratio}, "model.mask_ratio", str(ratio)) for ratio in (0.0, 1.0, 1.5, -0.1, 0.99)],
    ({"captioning": "prefix"}, "model.captioning", "'prefix' is not one of autoregressive, masked-language"),
    ({"text_unimodal_layers": 0, "text_cross_layers": 0}, "model.text_cross_layers", "at least one layer"),
]


@pytest.mark.parametrize("options, setting, says", WRONG, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_a_wrong_setting_is_named_in_one_line(options, setting, says):
    with pytest.raises(ModelConfigError) as error:
        resolve(MUGConfig(**options))
    message = str(error.value)
    assert setting in message and says in message and "\n" not in message


@pytest.mark.parametrize("image_size, patch_size", [(100, 8), (5, 8), (63, 16), (225, 14)])
def test_the_image_size_that_is_proposed_is_the_nearest_that_can_be_built(image_size, patch_size):
    with pytest.raises(ModelConfigError) as error:
        resolve(MUGConfig(image_size=image_size, patch_size=patch_size))
    proposed = int(re.search(r"(\d+) is$", str(error.value))[1])
    assert abs(proposed - image_size) <= patch_size / 2 or proposed == patch_size
    assert resolve(MUGConfig(image_size=proposed * 4, patch_size=patch_size)).grid == proposed * 4 // patch_size


@pytest.mark.parametrize("ratio, visible", [(0.02, 62), (0.5, 32), (0.984, 1)])
def test_extreme_mask_ratios_that_leave_one_patch_each_are_fine(ratio, visible):
    assert resolve(MUGConfig(mask_ratio=ratio)).visible == visible


def test_the_command_line_can_be_checked_without_torch():
    code = "import sys, mug.model.presets, mug.model.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
