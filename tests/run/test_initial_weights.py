"""What --init takes: weights as timm, MAE, DDP and transformers save them, and what it refuses."""

import argparse
import dataclasses
import fractions
import json
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from mug.model import interchange
from mug.model.encoder import PIXEL_MEAN, PIXEL_STD, Encoder
from mug.model.multilingual import MultilingualConfig
from mug.model.objectives.answer import Answer, AnswerConfig
from mug.model.objectives.classify import Classify, ClassifyConfig
from mug.model.objectives.clip import CLIP, CLIPConfig
from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Context, Objective
from mug.model.objectives.segment import Segment, SegmentConfig
from mug.model.objectives.unix2 import UniX2
from mug.model.positions import interpolate_pos_embed, sincos_2d
from mug.model.presets import Vocabulary, resolve
from mug.run.common.errors import RunError
from mug.run.state import checkpoint
from mug.run.state.initial import initial_encoder, initialize
from mug.run.state.restore import describe_model
from mug.run.state.sharded_state import ParamSlice, write_pieces

OUR_SIZES = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2}
CONFIG = resolve(ClassifyConfig(**OUR_SIZES, drop_path=0.0))
LARGER = dataclasses.replace(CONFIG, image_size=32)
CLASSES = Context(class_names=("a", "b", "c"))
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
THEIR_SIZES = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
THEIR_SIZES |= {"intermediate_size": 64, "layer_norm_eps": 1e-12}
MASKED = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
MASKED |= {"decoder_intermediate_size": 64, "mask_ratio": 0.0}
IMAGE = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.manual_seed(0))
MEAN, STD = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
PIXELS = (IMAGE / 255 - MEAN) / STD


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    torch.manual_seed(1)
    vit = timm.create_model("vit_base_patch16_224", num_classes=9, **SIZES).eval()
    torch.nn.init.normal_(vit.pos_embed)
    return vit


def settings() -> argparse.Namespace:
    """As MAE's and timm's training scripts save them."""
    return argparse.Namespace(lr=1e-3, output_dir=Path("out"), betas=(0.9, 0.95), dist_url="env://")


def prefixed(state: dict, prefix: str) -> dict:
    return {f"{prefix}{name}": value for name, value in state.items()}


SAVED = {
    "timm": lambda state: {"state_dict": state, "arch": "vit_base_patch16_224", "epoch": 3, "args": settings()},
    "MAE": lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3, "scaler": {}, "args": settings()},
    "DDP": lambda state: prefixed(state, "module."),
    "DDP inside timm's": lambda state: {"state_dict": prefixed(state, "module."), "epoch": 3},
    "compiled in DDP": lambda state: {"model": prefixed(state, "module._orig_mod.")},
    "averaged": lambda state: {"n_averaged": torch.tensor(3), **prefixed(state, "module.")},
    "DeepSpeed": lambda state: {"module": state, "dp_world_size": 1},
    "lightning": lambda state: {"state_dict": prefixed(state, "model.") | {"criterion.weight": torch.ones(3)}},
}


@pytest.mark.parametrize("how", SAVED)
@torch.inference_mode()
def test_weights_are_taken_however_a_training_script_wrapped_them(how, vit, tmp_path):
    torch.save(SAVED[how](vit.state_dict()), tmp_path / "checkpoint.pth")
    encoder = initial_encoder(CONFIG, str(tmp_path / "checkpoint.pth"), pytest.fail)
    assert (encoder(IMAGE) - vit.forward_features(PIXELS)).abs().max() < 1e-5


def test_of_two_sets_of_weights_it_is_reported_which_is_taken(vit, tmp_path):
    averaged = {name: value + 1 for name, value in vit.state_dict().items()}
    torch.save({"state_dict": vit.state_dict(), "state_dict_ema": averaged}, tmp_path / "both.pth")
    said = []
    encoder = initial_encoder(CONFIG, str(tmp_path / "both.pth"), said.append)
    assert torch.equal(encoder.norm.weight, vit.norm.weight)
    assert len(said) == 1 and "taking state_dict, not state_dict_ema" in said[0]


class Runs:
    """What a hostile file holds: it would run a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_no_code_of_a_file_is_run(vit, tmp_path):
    for name, hostile in {
        "alongside": {"model": vit.state_dict(), "args": Runs(f"touch {tmp_path}/ran")},
        "inside": {"model": vit.state_dict(), "args": argparse.Namespace(lr=Runs(f"touch {tmp_path}/ran"))},
    }.items():
        torch.save(hostile, tmp_path / f"{name}.pth")
        with pytest.raises(RunError, match=r"file contains a \w+\.system; save a plain state dict") as refused:
            initial_encoder(CONFIG, str(tmp_path / f"{name}.pth"), pytest.fail)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


# --- Folders of save_pretrained -----------------------------------------------------------------------------

KINDS = {
    "ViTModel": lambda: ViTModel(ViTConfig(**THEIR_SIZES)),
    "a classifier": lambda: ViTForImageClassification(ViTConfig(**THEIR_SIZES)),
    "ViTMAE": lambda: ViTMAEForPreTraining(ViTMAEConfig(**THEIR_SIZES, **MASKED)),
}


def features(model: torch.nn.Module) -> torch.Tensor:
    """The last layer's normalised output, of transformers."""
    if isinstance(model, ViTMAEForPreTraining):
        return model.vit(PIXELS, noise=torch.arange(16.0).expand(2, 16)).last_hidden_state
    return getattr(model, "vit", model)(PIXELS).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_folder_of_save_pretrained_is_taken_with_the_eps_of_its_norms(kind, tmp_path):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.mul_(1e-3)  # so small that eps decides
    model.save_pretrained(tmp_path)
    expected = features(model)
    with pytest.raises(RunError, match=r"layer_norm_eps is 1e-12 there, 1e-06 here; set model\.norm_eps to 1e-12"):
        initial_encoder(CONFIG, str(tmp_path), pytest.fail)
    encoder = initial_encoder(dataclasses.replace(CONFIG, norm_eps=1e-12), str(tmp_path), pytest.fail)
    assert (encoder(IMAGE) - expected).abs().max() < 1e-3
    as_file = initial_encoder(CONFIG, str(tmp_path / "model.safetensors"), pytest.fail)
    assert (as_file(IMAGE) - expected).abs().max() > 0.1, "the file alone does not tell its eps"
    assert encoder.norm.eps == encoder.blocks[2].norm1.eps == 1e-12


@torch.inference_mode()
def test_a_folder_in_several_files_is_taken(tmp_path):
    model = ViTModel(ViTConfig(**THEIR_SIZES | {"layer_norm_eps": 1e-6})).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and not (tmp_path / "model.safetensors").exists()
    encoder = initial_encoder(CONFIG, str(tmp_path), pytest.fail)
    assert (encoder(IMAGE) - features(model)).abs().max() < 1e-5


@torch.inference_mode()
def test_a_folder_of_timm_is_taken(vit, tmp_path):
    timm.models.save_for_hf(vit, str(tmp_path), model_args={**SIZES})
    encoder = initial_encoder(CONFIG, str(tmp_path), [].append)  # which warns: timm's mean is 0.5
    assert (encoder(IMAGE) - vit.forward_features(PIXELS)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads is 4 there, 2 here; set model.heads"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is quick_gelu, but this model uses gelu"),
        ({"hidden_size": 32}, "hidden_size is 32 there, 16 here; set model.width"),
    ],
)
def test_a_folder_of_a_model_that_computes_otherwise_is_refused(changed, says, tmp_path):
    ViTModel(ViTConfig(**THEIR_SIZES | {"layer_norm_eps": 1e-6} | changed)).save_pretrained(tmp_path)
    with pytest.raises(RunError, match=re.escape(says)):
        initial_encoder(CONFIG, str(tmp_path), pytest.fail)


def test_other_colours_are_reported_and_a_folder_without_weights_is_refused(vit, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"has a config\.json, but none of model\.safetensors, pytorch_model\.bin"):
        initial_encoder(CONFIG, str(tmp_path), pytest.fail)
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    halves = {"image_mean": [0.5, 0.5, 0.5], "image_std": list(PIXEL_STD)}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(halves))
    said = []
    initial_encoder(CONFIG, str(tmp_path), said.append)
    assert len(said) == 1 and "was trained with image_mean [0.5, 0.5, 0.5]" in said[0]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json cannot be read"):
        initial_encoder(CONFIG, str(tmp_path), pytest.fail)


# --- Runs, and positions of another image size ---------------------------------------------------------------


def test_weights_of_a_real_timm_vit_are_taken_with_its_positions(vit, tmp_path):
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    torch.save({"model": vit.state_dict()}, tmp_path / "mae.pth")
    for name in ("vit.safetensors", "mae.pth"):
        encoder = initial_encoder(CONFIG, str(tmp_path / name), pytest.fail)
        assert (encoder(IMAGE) - vit.forward_features(PIXELS)).abs().max() < 1e-4
        model = Classify(CONFIG, CLASSES)
        model.adopt(encoder)
        assert torch.equal(model.encoder.positions_ND, vit.pos_embed[0, 1:]), "and are trained from there"


def test_positions_of_a_files_smaller_images_are_stretched(tmp_path):
    small, large = (dataclasses.replace(config, depth=4) for config in (CONFIG, LARGER))
    given = interchange.to_timm(Encoder(small))
    given["pos_embed"] = torch.randn(1, 17, 16)
    save_file(given, tmp_path / "learned.safetensors")
    encoder = initial_encoder(large, str(tmp_path / "learned.safetensors"), pytest.fail)
    expected = resample_abs_pos_embed(given["pos_embed"], [8, 8], [4, 4], num_prefix_tokens=1, antialias=False)
    torch.testing.assert_close(encoder.positions_ND, expected[0, 1:])
    torch.testing.assert_close(encoder.cls_token, given["cls_token"] + given["pos_embed"][:, :1])
    assert torch.equal(encoder.blocks[2].mlp.fc2.weight, given["blocks.2.mlp.fc2.weight"])
    model = Segment(resolve(SegmentConfig(**OUR_SIZES | {"image_size": 32, "depth": 4}, channels=8)), CLASSES)
    model.adopt(encoder)
    torch.testing.assert_close(model.encoder.positions_ND, expected[0, 1:])


def saved(output: Path, model: Objective) -> str:
    """A checkpoint of the model, as one rank writes it."""
    partial = checkpoint.open_partial(output, 1)
    pieces = {ParamSlice(name, 0): value.detach().flatten() for name, value in model.named_parameters()}
    checksum, _ = write_pieces(partial / "weight-0.safetensors", pieces)
    manifest = {"model": json.loads(json.dumps(describe_model(model)))}
    checkpoint.commit(output, 1, {"weight-0.safetensors": checksum}, manifest, {}, keep=1)
    return str(output)


def test_positions_of_a_pretraining_run_are_stretched_too(tmp_path):
    pretrained = MUG(resolve(MUGConfig(**OUR_SIZES)), Context(vocabulary=Vocabulary(20, 0, 1, 2, 3)))
    run = saved(tmp_path / "run", pretrained)
    same = initial_encoder(CONFIG, run, pytest.fail)
    assert torch.equal(same.positions_ND, sincos_2d(16, 4))
    assert torch.equal(same.blocks[1].mlp.fc1.weight, pretrained.encoder.blocks[1].mlp.fc1.weight)
    larger = initial_encoder(LARGER, run, pytest.fail)
    torch.testing.assert_close(larger.positions_ND, interpolate_pos_embed(sincos_2d(16, 4), 8))
    assert torch.equal(larger.cls_token, same.cls_token)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_finetuned_encoder_is_taken_with_its_trained_positions_and_norm(tmp_path, pool):
    tuned = Classify(dataclasses.replace(CONFIG, pool=pool, drop_path=0.1), CLASSES).eval()
    for parameter in tuned.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    run = saved(tmp_path / "run", tuned)
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = tuned.encoder(image)
    encoder = initial_encoder(CONFIG, run, pytest.fail)
    torch.testing.assert_close(encoder(image), expected)
    again = Classify(CONFIG, CLASSES)
    again.adopt(encoder)
    assert torch.equal(again.encoder.positions_ND, tuned.encoder.positions_ND)
    larger = initial_encoder(LARGER, run, pytest.fail)
    torch.testing.assert_close(larger.positions_ND, interpolate_pos_embed(tuned.encoder.positions_ND.detach(), 8))


# --- Parts other than the encoder ------------------------------------------------------------------------------

TOWERS = resolve(CLIPConfig(**OUR_SIZES, text_width=16, text_heads=2, text_layers=1, text_length=8, embedding_width=8))
WORDS = Context(vocabulary=Vocabulary(20, 0, 1, 2, 3))


def towers(seed: int, **changed: object) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(dataclasses.replace(TOWERS, **changed), WORDS)


@pytest.mark.parametrize("source", ["run", "state dict", "state dict of the model"])
def test_each_part_begins_with_the_weights_that_it_is_given(source, tmp_path, vit):
    other, model, fresh = towers(1), towers(2), towers(2)
    torch.save({"state_dict": vit.state_dict()}, tmp_path / "vit.pth")
    if source == "run":
        path = saved(tmp_path / "run", other)
    else:
        path = str(tmp_path / "text.safetensors")
        prefix = "text_encoder." if source == "state dict of the model" else ""
        save_file(prefixed(other.text_encoder.state_dict(), prefix), path)
    initialize(model, {"encoder": str(tmp_path / "vit.pth"), "text_encoder": path}, pytest.fail)
    assert torch.equal(model.encoder.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)
    for name, weight in model.text_encoder.state_dict().items():
        assert torch.equal(weight, other.text_encoder.state_dict()[name]), name
    assert torch.equal(model.text_projection.weight, fresh.text_projection.weight)


def test_a_part_takes_the_words_that_it_shares_with_others(tmp_path):
    """UniX²'s encoder of text has the matrix of its decoder's words; an encoder that answers questions, its own."""
    sizes = {**OUR_SIZES, "text_width": 16, "text_heads": 2, "text_length": 8, "text_layers": 1, "fusion_layers": 1}
    writer = UniX2(resolve(MultilingualConfig(**sizes, decoder_layers=1, embedding_width=8)), WORDS)
    for parameter in writer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = Answer(resolve(AnswerConfig(**sizes)), Context(vocabulary=WORDS.vocabulary, class_names=("no", "yes")))
    run, parts = saved(tmp_path / "run", writer), ("encoder", "text_encoder", "fusion_encoder")
    initialize(model, dict.fromkeys(parts, run), pytest.fail)
    for part in parts:
        theirs = writer.get_submodule(part).state_dict()
        for name, weight in model.get_submodule(part).state_dict().items():
            assert torch.equal(weight, theirs[name]), f"{part}.{name}"
    assert torch.equal(model.text_encoder.words.embed.weight, writer.head.weight)
    again = UniX2(writer.config, WORDS)
    initialize(again, {"text_encoder": run}, pytest.fail)
    assert torch.equal(again.head.weight, writer.head.weight)


def test_parts_that_do_not_fit_are_refused_in_one_line(tmp_path):
    run, file = saved(tmp_path / "run", towers(1)), tmp_path / "one.pth"
    torch.save({"weight": torch.ones(2)}, file)
    cases = {
        ("text_tower", run): "init.text_tower: the model has no part of this name; it has encoder, text_encoder, ",
        ("text_encoder", "nowhere"): "init.text_encoder nowhere: no such file or folder",
        (
            "text_encoder.embed",
            str(file),
        ): "text_encoder.embed.weight is (2,) there, (20, 32) here; change the section model",
        ("text_encoder", run): "has another size: text_encoder.position_embed is (8, 16) there, (8, 32) here",
        ("text_encoder.blocks.1", run): "does not hold text_encoder.blocks.1.norm1.weight; name another run or file",
    }
    for (part, path), message in cases.items():
        model = towers(2, text_width=32, text_layers=2)
        with pytest.raises(RunError, match=re.escape(message)) as refused:
            initialize(model, {part: path}, pytest.fail)
        assert "\n" not in str(refused.value)
    save_file(towers(1).text_encoder.state_dict() | {"head.bias": torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.raises(RunError, match=r"holds text_encoder\.head\.bias, which this model does not have"):
        initialize(towers(2), {"text_encoder": str(tmp_path / "more.safetensors")}, pytest.fail)


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path):
    wide = dataclasses.replace(CONFIG, width=32)
    save_file(interchange.to_timm(Encoder(wide)), tmp_path / "wide.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "broken.pth").write_bytes(b"x" * 100)
    (tmp_path / "empty.pth").touch()
    torch.save({"model": {}, "args": fractions.Fraction(1)}, tmp_path / "objects.pth")
    cases = {
        "wide.safetensors": "have another size: cls_token is (1, 1, 32), but (1, 1, 16) in the encoder",
        "broken.safetensors": "cannot load",
        "broken.pth": "cannot load",
        "empty.pth": "cannot load: it is empty",
        "objects.pth": "file contains a fractions.Fraction; save a plain state dict",
        "nowhere": "no such file or folder",
        ".": "does not hold a checkpoint",
    }
    for name, message in cases.items():
        with pytest.raises(RunError, match=re.escape(message)) as refused:
            initial_encoder(CONFIG, str(tmp_path / name), pytest.fail)
        assert "\n" not in str(refused.value)


def test_a_segmentation_run_holds_no_whole_encoder(tmp_path):
    model = Segment(resolve(SegmentConfig(**OUR_SIZES | {"depth": 4}, channels=8)), CLASSES)
    run = saved(tmp_path / "run", model)
    with pytest.raises(RunError, match=r"does not hold a complete encoder \(no final norm\); name another run"):
        initial_encoder(dataclasses.replace(CONFIG, depth=4), run, pytest.fail)


def test_a_run_of_another_size_is_refused(tmp_path):
    run = saved(tmp_path / "run", Classify(CONFIG, CLASSES))
    for changed, says in (
        ({"width": 32}, r"width is 16 there, 32 here; set model\.width"),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-06 there, 1e-05 here"),
    ):
        with pytest.raises(RunError, match=says):
            initial_encoder(dataclasses.replace(CONFIG, **changed), run, pytest.fail)
