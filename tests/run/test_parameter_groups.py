"""Weight decay and layer-wise learning rates, by parameter."""

from types import SimpleNamespace

import pytest
import timm
from timm.optim import param_groups_layer_decay

from mug.model.objectives.classify import Classify, ClassifyConfig
from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Context
from mug.model.presets import Vocabulary, resolve
from mug.run.training.engine import set_learning_rate
from mug.run.training.groups import has_weight_decay, layer_of, parameter_groups
from mug.run.training.recipe import TrainerConfig

SIZES = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2}


def test_weight_decay_spares_norms_biases_tokens_and_positions():
    model = MUG(resolve(MUGConfig("tiny")), Context(vocabulary=Vocabulary(100, 0, 1, 2, 3)))
    groups = parameter_groups(model, TrainerConfig(weight_decay=0.05))
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [(0.05, 1), (0, 1)]
    decayed, spared = ({id(p) for p in group["params"]} for group in groups)
    names = dict(model.named_parameters())
    assert len(decayed) + len(spared) == len(names)
    for name, parameter in names.items():
        special = name.rpartition(".")[2] in ("bias", "cls_token", "mask_token", "position_embed") or "norm" in name
        assert (id(parameter) in spared) == special, name


@pytest.mark.parametrize("layer_decay", [1.0, 0.65])
def test_what_is_frozen_is_in_no_group(layer_decay):
    model = Classify(resolve(ClassifyConfig(**SIZES)), Context(class_names=("a", "b")))
    model.encoder.blocks[1].requires_grad_(False)
    groups = parameter_groups(model, TrainerConfig(layer_decay=layer_decay))
    learning = {id(p) for name, p in model.named_parameters() if not name.startswith("encoder.blocks.1.")}
    assert {id(p) for group in groups for p in group["params"]} == learning


def test_layer_decay_is_timms():
    model = Classify(resolve(ClassifyConfig(**SIZES)), Context(class_names=tuple("abcde")))
    ours = {}
    for group in parameter_groups(model, TrainerConfig(weight_decay=0.05, layer_decay=0.65)):
        ours |= {id(p): (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    ours = {name: ours[id(p)] for name, p in model.named_parameters()}
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    vit = timm.create_model("vit_base_patch16_224", num_classes=5, global_pool="avg", **sizes)
    names = {id(p): name for name, p in vit.named_parameters()}
    compared = 0
    for group in param_groups_layer_decay(vit, 0.05, ("pos_embed", "cls_token"), layer_decay=0.65):
        for parameter in group["params"]:
            name = names[id(parameter)]
            mine = name.replace("pos_embed", "positions_ND").replace("fc_norm", "norm")
            mine = mine if mine.startswith("head") else f"encoder.{mine}"
            assert ours.pop(mine) == pytest.approx((group["lr_scale"], group["weight_decay"])), name
            compared += 1
    assert not ours and compared == 3 * 12 + 4 + 4


def test_layers_are_numbered_from_the_patches_to_the_head():
    numbers = {name: layer_of(name, 12) for name in ("encoder.cls_token", "encoder.patch_embed.proj.weight")}
    assert set(numbers.values()) == {0}
    assert layer_of("encoder.blocks.0.norm1.weight", 12) == 1 and layer_of("encoder.blocks.11.mlp.fc2.bias", 12) == 12
    assert layer_of("head.weight", 12) == layer_of("text_decoder.norm.bias", 12) == 13
    assert layer_of("encoder.norm.weight", 12) == 13


class Still(MUG):
    frozen = ("encoder.patch_embed",)
    constant_rate = ("pixel_decoder",)


@pytest.mark.parametrize("layer_decay", [1.0, 0.65])
def test_what_an_objective_freezes_and_what_keeps_its_rate_are_groups_of_their_own(layer_decay):
    model = Still(resolve(MUGConfig("tiny")), Context(vocabulary=Vocabulary(100, 0, 1, 2, 3)))
    groups = parameter_groups(model, TrainerConfig(layer_decay=layer_decay, weight_decay=0.05))
    set_learning_rate(SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups)), 0.25, peak=1.0)
    of = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = of[id(parameter)]
        if name.startswith("encoder.patch_embed."):
            assert (group["lr"], group["weight_decay"]) == (0, 0)
        elif name.startswith("pixel_decoder."):
            assert (group["lr"], group["weight_decay"]) == (1.0, 0.05 if has_weight_decay(name, parameter) else 0)
        else:
            assert group["lr"] == pytest.approx(0.25 * layer_decay ** (5 - layer_of(name, 4)))
