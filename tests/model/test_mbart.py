"""mBART's weights in the parts of UniX²: transformers' own model is the oracle for what ours compute."""

import pytest
import torch
from noise import noisy
from torch import nn
from transformers import MBartConfig, MBartForConditionalGeneration

from mug.model.generate import write
from mug.model.interchange import load_mbart
from mug.model.multilingual import MultilingualConfig
from mug.model.objectives.objective import Context
from mug.model.objectives.unix2 import UniX2
from mug.model.presets import ModelConfigError, Vocabulary, resolve
from mug.model.text_decoder import pack

WIDTH, HEADS, LAYERS, WORDS = 32, 4, 3, 40
SIZES = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "embedding_width": 8}
SIZES |= {"text_width": WIDTH, "text_heads": HEADS, "text_length": 12}
SIZES |= dict.fromkeys(("text_layers", "fusion_layers", "decoder_layers"), LAYERS)
SOURCE = torch.tensor([[0, 7, 8, 9, 10, 2, 5], [0, 11, 2, 6, 1, 1, 1], [0, 12, 13, 14, 2, 5, 1]])
TARGET = torch.tensor([[6, 20, 21, 22, 2], [5, 23, 2, 1, 1], [6, 24, 25, 2, 1]])


def make(**sizes: int) -> UniX2:
    vocabulary = Vocabulary(WORDS, pad=1, bos=0, eos=2, mask=3, languages=("en", "de"), language_ids=(5, 6))
    torch.manual_seed(0)
    return UniX2(resolve(MultilingualConfig(**SIZES | sizes)), Context(vocabulary=vocabulary))


def make_mbart(**options: object) -> MBartForConditionalGeneration:
    layers = {"encoder_layers": LAYERS, "decoder_layers": LAYERS}
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
    wide = {"encoder_ffn_dim": 4 * WIDTH, "decoder_ffn_dim": 4 * WIDTH}
    sizes = {"vocab_size": WORDS, "d_model": WIDTH, "max_position_embeddings": 16, **layers, **heads, **wide}
    torch.manual_seed(0)
    return noisy(MBartForConditionalGeneration(MBartConfig(scale_embedding=True, **sizes, **options))).eval()


@pytest.fixture(scope="module")
def mbart() -> MBartForConditionalGeneration:
    return make_mbart()


@pytest.fixture(scope="module")
def opinionated() -> MBartForConditionalGeneration:
    """One whose next words are far from uniform, and differ by place, so that texts end early and late."""
    model = make_mbart(forced_eos_token_id=None)
    with torch.no_grad():
        model.model.decoder.embed_positions.weight.mul_(40)
        for parameter in model.model.decoder.layers.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        words = model.model.shared.weight
        words.add_(torch.randn_like(words), alpha=0.6)
        model.model.decoder.layer_norm.bias.add_(2 * words[2] / words[2].norm())
    return model


@torch.no_grad()
def test_encoder_decoder_and_head_are_transformers(mbart):
    model, seen = make(), SOURCE != 1
    load_mbart(model, mbart.state_dict())
    packing = pack(seen.sum(1), SOURCE.shape[1], 0)
    states_RD = model.text_encoder(SOURCE, packing)
    theirs = mbart(input_ids=SOURCE, attention_mask=seen, decoder_input_ids=TARGET)
    expected_RD = theirs.encoder_last_hidden_state[seen]
    assert (states_RD - expected_RD).abs().max() < 1e-5
    written = pack((TARGET != 1).sum(1), TARGET.shape[1], 0)
    written = written._replace(memory_starts=packing.starts, longest_memory=SOURCE.shape[1])
    logits_RV = model.head(model.decoder(TARGET, states_RD, packing=written))
    assert (logits_RV - theirs.logits[TARGET != 1]).abs().max() < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("first, forced", [((6,), None), ((0, 6), 6)])
@pytest.mark.parametrize("beams", [2, 4])
def test_beams_are_transformers(opinionated, first, forced, beams):
    """A language first, as mBART-25 begins with it or as mBART-50 forces it after its start; sources of any length."""
    model, random = make(), torch.Generator().manual_seed(1)
    load_mbart(model, opinionated.state_dict())
    lengths = torch.randint(4, 8, (32,), generator=random)
    place = torch.arange(7)
    source = torch.randint(7, WORDS, (32, 7), generator=random).where(place < lengths[:, None], 1)
    seen = source != 1
    theirs = opinionated.generate(
        input_ids=source,
        attention_mask=seen,
        num_beams=beams,
        max_length=12,
        decoder_start_token_id=first[0],
        forced_bos_token_id=forced,
        suppress_tokens=[1, first[0]],
        renormalize_logits=True,
    )
    memory = torch.zeros(32, 7, WIDTH)
    memory[seen] = model.text_encoder(source, pack(lengths, 7, 0))
    ours = write(model.decoder, model.vocabulary, memory, beams, first, lengths)
    assert torch.equal(ours[:, : theirs.shape[1]], theirs) and (ours[:, theirs.shape[1] :] == 1).all()
    assert (theirs[:, : len(first)] == torch.tensor(first)).all()
    assert len((theirs != 1).sum(1).unique()) > 2, "they end early and late"
    assert not torch.equal(write(model.decoder, model.vocabulary, memory, 1, first, lengths), ours)


def test_the_fusion_encoder_is_a_second_copy_of_the_encoder(mbart):
    model = make()
    load_mbart(model, mbart.state_dict())
    text, fusion = model.text_encoder.state_dict(), model.fusion_encoder.state_dict()
    copied = [name for name in text if name.startswith(("blocks.", "norm."))]
    assert len(copied) == 12 * LAYERS + 2
    for name in copied:
        assert torch.equal(text[name], fusion[name]) and text[name].data_ptr() != fusion[name].data_ptr(), name
    assert model.head.weight is model.text_encoder.words.embed.weight is model.decoder.words.embed.weight


def test_weights_that_do_not_fit_are_named(mbart):
    state = mbart.state_dict()
    with pytest.raises(ModelConfigError, match=r"unexpected key blocks\.2\."):
        load_mbart(make(text_layers=2), state)
    with pytest.raises(ModelConfigError, match=r"missing key blocks\.3\."):
        load_mbart(make(decoder_layers=4), state)
    with pytest.raises(ModelConfigError, match=r"words\.position_embed is \(16, 32\), but \(31, 32\)"):
        load_mbart(make(text_length=30), state)
    with pytest.raises(ModelConfigError, match="final_logits_bias is not 0"):
        load_mbart(make(), state | {"final_logits_bias": torch.ones(1, WORDS)})
    with pytest.raises(ModelConfigError, match=r"missing key encoder\.embed_positions"):
        load_mbart(make(), nn.Linear(2, 2).state_dict())
