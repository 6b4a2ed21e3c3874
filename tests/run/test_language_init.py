"""UniX² begins as in the paper: its image encoder from a ViT, its texts' parts from a folder of a language model."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import MBartConfig, MBartForConditionalGeneration, XLMRobertaConfig, XLMRobertaModel

from mug.model.interchange import load_mbart, load_xlmr
from mug.model.multilingual import MultilingualConfig
from mug.model.objectives.clip import CLIP, CLIPConfig
from mug.model.objectives.objective import Context
from mug.model.objectives.unix2 import UniX2
from mug.model.presets import Vocabulary, resolve
from mug.run.common.errors import RunError
from mug.run.state.initial import initialize

WORDS = 40
SIZES = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "embedding_width": 8}
SIZES |= {"text_width": 32, "text_heads": 4, "text_length": 12, "decoder_layers": 2}
MBART = {"text_model": "mbart", "text_layers": 2, "fusion_layers": 2}
XLMR = {"text_model": "xlmr", "text_layers": 1, "fusion_layers": 1}
VOCABULARY = Vocabulary(WORDS, pad=1, bos=0, eos=2, mask=3, languages=("en", "de"), language_ids=(5, 6))


def make(sizes: dict) -> UniX2:
    return UniX2(resolve(MultilingualConfig(**SIZES | sizes)), Context(vocabulary=VOCABULARY))


def mbart(**options) -> MBartForConditionalGeneration:
    layers = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    wide = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 128)
    options = {"scale_embedding": True, "vocab_size": WORDS, "d_model": 32, **layers, **heads, **wide, **options}
    return MBartForConditionalGeneration(MBartConfig(max_position_embeddings=16, **options))


def test_an_image_encoder_from_timm_and_all_texts_parts_from_an_mbart(tmp_path):
    vit = timm.create_model(
        "vit_base_patch16_224", num_classes=0, img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2
    )
    theirs = mbart()
    theirs.save_pretrained(tmp_path / "mbart")
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    model, expected = make(MBART), make(MBART)
    paths = {"encoder": str(tmp_path / "vit.safetensors"), "language_model": str(tmp_path / "mbart")}
    initialize(model, paths, pytest.fail)
    load_mbart(expected, theirs.state_dict())
    assert torch.equal(model.encoder.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)
    assert torch.equal(model.encoder.positions_ND, vit.pos_embed[0, 1:]), "and they are learned from there"
    assert torch.equal(model.head.weight, theirs.model.shared.weight)
    for part in ("text_encoder", "decoder", "fusion_encoder.blocks"):
        found = model.get_submodule(part).state_dict()
        for name, value in expected.get_submodule(part).state_dict().items():
            assert torch.equal(found[name], value), f"{part}.{name}"


def test_texts_parts_from_an_xlmr(tmp_path):
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 128, "max_position_embeddings": 18, "type_vocab_size": 1}
    theirs = XLMRobertaModel(XLMRobertaConfig(**sizes, layer_norm_eps=1e-5))
    theirs.save_pretrained(tmp_path / "xlmr")
    model, expected = make(XLMR), make(XLMR)
    initialize(model, {"language_model": str(tmp_path / "xlmr")}, pytest.fail)
    load_xlmr(expected, theirs.state_dict())
    layer = theirs.encoder.layer[1].output.dense.weight
    assert torch.equal(model.fusion_encoder.blocks[0].mlp.fc2.weight, layer)
    assert torch.equal(model.text_encoder.words.position_embed, expected.text_encoder.words.position_embed)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"encoder_attention_heads": 8}, "encoder_attention_heads is 8 there, 4 here"),
        ({"scale_embedding": False}, "scale_embedding is False there, True here"),
        ({"d_model": 64}, r"the weights have another size: "),
        ({"encoder_layers": 3}, r"unexpected key blocks\.2\..*, which the multilingualencoder does not have"),
    ],
)
def test_a_language_model_that_does_not_fit_is_refused_by_its_path(tmp_path, options, line):
    mbart(**options).save_pretrained(tmp_path / "mbart")
    with pytest.raises(RunError, match=rf"^init\.language_model .*mbart: {line}") as refused:
        initialize(make(MBART), {"language_model": str(tmp_path / "mbart")}, pytest.fail)
    assert "\n" not in str(refused.value)


def test_mistakes_in_the_option(tmp_path):
    with pytest.raises(RunError, match=r"init\.language_model .* has no config\.json: give a folder that save_pretr"):
        initialize(make(MBART), {"language_model": str(tmp_path)}, pytest.fail)
    sizes = {name: SIZES[name] for name in ("image_size", "patch_size", "width", "depth", "heads")}
    clip = CLIP(resolve(CLIPConfig(**sizes)), Context(vocabulary=VOCABULARY))
    with pytest.raises(RunError, match=r"init\.language_model: the model has no part of this name"):
        initialize(clip, {"language_model": str(tmp_path)}, pytest.fail)
