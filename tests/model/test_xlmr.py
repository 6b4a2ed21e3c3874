"""XLM-R's weights in the parts of UniX², as of table 4: transformers' own model is the oracle for what ours compute."""

import pytest
import torch
from noise import noisy
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM, XLMRobertaModel

from mug.model.interchange import load_language_model, load_xlmr
from mug.model.multilingual import MultilingualConfig
from mug.model.objectives.objective import Context
from mug.model.objectives.unix2 import UniX2
from mug.model.presets import ModelConfigError, Vocabulary, resolve
from mug.model.text_decoder import pack

WIDTH, HEADS, WORDS = 32, 4, 40
SIZES = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "embedding_width": 8}
SIZES |= {"text_width": WIDTH, "text_heads": HEADS, "text_length": 12, "text_layers": 2, "fusion_layers": 3}
SIZES |= {"decoder_layers": 1, "text_model": "xlmr"}
TOKENS = torch.tensor([[0, 7, 8, 9, 10, 2, 5], [0, 11, 2, 6, 1, 1, 1], [0, 12, 13, 14, 2, 5, 1]])
CONFIG = XLMRobertaConfig(
    vocab_size=WORDS,
    hidden_size=WIDTH,
    num_hidden_layers=5,
    num_attention_heads=HEADS,
    intermediate_size=4 * WIDTH,
    max_position_embeddings=18,
    layer_norm_eps=1e-5,
    type_vocab_size=1,
)


def make(words: int = WORDS, **sizes) -> UniX2:
    vocabulary = Vocabulary(words, pad=1, bos=0, eos=2, mask=3, languages=("en", "de"), language_ids=(5, 6))
    torch.manual_seed(0)
    return UniX2(resolve(MultilingualConfig(**SIZES | sizes)), Context(vocabulary=vocabulary))


@pytest.fixture(scope="module")
def xlmr() -> XLMRobertaModel:
    torch.manual_seed(1)
    return noisy(XLMRobertaModel(CONFIG)).eval()


@torch.no_grad()
def test_text_and_fusion_encoder_are_its_two_halves(xlmr):
    model, seen = make(), TOKENS != 1
    load_xlmr(model, xlmr.state_dict())
    packing = pack(seen.sum(1), TOKENS.shape[1], 0)
    theirs = xlmr(input_ids=TOKENS, attention_mask=seen, output_hidden_states=True).hidden_states
    x_RD = model.text_encoder(TOKENS, packing)
    assert (x_RD - theirs[2][seen]).abs().max() < 1e-5
    for block in model.fusion_encoder.blocks:
        x_RD = block(x_RD, None, False, packing)
    assert (model.fusion_encoder.norm(x_RD) - theirs[5][seen]).abs().max() < 1e-5


def test_a_masked_language_model_has_the_same_encoder_and_further_languages_stay_as_drawn(xlmr):
    whole = XLMRobertaForMaskedLM(CONFIG)
    whole.roberta.load_state_dict(xlmr.state_dict(), strict=False)
    model, plain = make(WORDS + 2), make()
    drawn = model.head.weight[WORDS:].clone()
    load_language_model(model, whole.state_dict(), CONFIG.to_dict())
    load_xlmr(plain, xlmr.state_dict())
    for name, value in plain.text_encoder.state_dict().items():
        assert torch.equal(model.text_encoder.state_dict()[name][: len(value)], value), name
    assert torch.equal(model.head.weight[WORDS:], drawn) and model.head.weight is model.decoder.words.embed.weight
    with pytest.raises(ModelConfigError, match=r"words\.embed\.weight is \(40, 32\), but \(43, 32\)"):
        load_language_model(make(WORDS + 3), whole.state_dict(), CONFIG.to_dict())


def test_every_parameter_of_the_variant_learns():
    from unix2 import KINDS, VOCABULARY, batch_at

    model = UniX2(resolve(MultilingualConfig(**SIZES | {"text_length": 14})), Context(vocabulary=VOCABULARY))
    for kind in KINDS:
        sum(model(batch_at(kind, [1, 2, 3, 6]))[0].values()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_the_preset_has_the_parameters_of_a_vit_base_and_xlmr():
    vocabulary = Vocabulary(250_002, pad=1, bos=0, eos=2, mask=250_001)
    with torch.device("meta"):
        model = UniX2(resolve(MultilingualConfig("base-xlmr")), Context(vocabulary=vocabulary))
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    # Half of XLM-R base's 85.1M in layers each; positions are cut to the text's length.
    assert millions["text_encoder"] == pytest.approx(192.0 + 42.5, abs=0.4)
    assert millions["fusion_encoder"] == pytest.approx(42.5 + 0.6, abs=0.2)
    assert millions["encoder"] == pytest.approx(85.8, abs=0.1)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_type": "bert"}, "model_type is bert: only mbart and xlm-roberta can be read"),
        ({"model_type": "mbart"}, "a mbart needs model.text_model mbart, not xlmr"),
        ({"num_attention_heads": 8}, "num_attention_heads is 8 there, 4 here"),
        ({"hidden_act": "relu"}, "hidden_act is relu there, gelu here"),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps is 1e-12 there, 1e-05 here"),
    ],
)
def test_models_that_compute_something_else_are_named(xlmr, change, line):
    with pytest.raises(ModelConfigError, match=line):
        load_language_model(make(), xlmr.state_dict(), CONFIG.to_dict() | change)


def test_weights_that_do_not_fit_are_named(xlmr):
    state = xlmr.state_dict()
    with pytest.raises(ModelConfigError, match=r"missing key blocks\.3\.norm1\.weight: .*fusionencoder"):
        load_xlmr(make(fusion_layers=4), state)
    with pytest.raises(ModelConfigError, match=r"unexpected key blocks\.2\..*fusionencoder"):
        load_xlmr(make(fusion_layers=2), state)
    with pytest.raises(ModelConfigError, match=r"words\.position_embed is \(16, 32\), but \(31, 32\)"):
        load_xlmr(make(text_length=30), state)
    with pytest.raises(ModelConfigError, match="not an XLM-R"):
        load_xlmr(make(), torch.nn.Linear(2, 2).state_dict())
