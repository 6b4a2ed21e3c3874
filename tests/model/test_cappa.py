"""CapPa: the formulae of arXiv 2306.07915 in float64, sample by sample; what parallel prediction sees; captions."""

import dataclasses

import pytest
import torch
from plain import (
    ENCODER,
    VOCABULARY,
    assert_captions_are_likeliest,
    assert_micro_batches_add_up,
    assert_same_losses_and_gradients,
    block,
    build,
    counted_flops,
    encode,
    norm,
    pairs,
    parameters,
    prefix_mask,
    rows,
)

from mug.model.objectives.cappa import CapPa, CapPaConfig
from mug.model.objectives.objective import Captions, Context, ObjectiveError
from mug.model.presets import ModelConfigError, Vocabulary, resolve

SIZES = ENCODER | {"depth": 1, "text_width": 16, "text_heads": 2, "text_cross_layers": 2, "text_length": 8}
SIZES |= {"parallel_share": 0.5}
CONTEXT = Context(seed=6, vocabulary=VOCABULARY)


def make(**options) -> CapPa:
    return build(CapPa, SIZES | options, CONTEXT)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return pairs([6, 1, None, 4, 3])


def expected(model: CapPa, p: dict, batch: dict) -> dict[str, torch.Tensor]:
    nats, parallel_B = [], model.in_parallel(batch["position"])
    for image, tokens_T, parallel in zip(batch["image"], batch["tokens"], parallel_B, strict=True):
        tokens_T = tokens_T[tokens_T != 0]
        inputs, targets = tokens_T[:-1], tokens_T[1:]
        if parallel:
            inputs = torch.full_like(inputs, 3)
        if len(targets):
            x = p["text_decoder.embed.weight"][inputs] + p["text_decoder.position_embed"][: len(inputs)]
            memory_LD = encode(p, model, image)
            for layer in range(2):
                x = block(p, f"text_decoder.blocks.{layer}", 2, x, prefix_mask(len(x), 0), memory_LD)
            logits_TV = norm(p, "text_decoder.norm", x) @ p["text_decoder.head.weight"].T
            nats.append(-logits_TV.log_softmax(-1)[torch.arange(len(x)), targets])
    return {"caption": torch.cat(nats).mean()}


@pytest.mark.parametrize(("share", "drawn"), [(0.0, {False}), (0.5, {False, True}), (1.0, {True})])
def test_the_loss_and_every_gradient_are_those_of_the_paper(batch, share, drawn):
    model = make(parallel_share=share)
    assert set(model.in_parallel(batch["position"]).tolist()) == drawn
    p = parameters(model)
    assert_same_losses_and_gradients(model, batch, expected(model, p, batch), p)


def test_the_share_is_drawn_by_position_alone(batch):
    model = make(parallel_share=0.75)
    many = torch.arange(4000)
    assert model.in_parallel(many).float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert torch.equal(model.in_parallel(many)[7::9], model.in_parallel(many[7::9]))
    assert not make(parallel_share=0.0).in_parallel(many).any() and make(parallel_share=1.0).in_parallel(many).all()


def test_in_parallel_a_prediction_depends_on_the_image_and_the_place_alone(batch):
    model = make(parallel_share=1.0)
    other = batch | {"tokens": batch["tokens"].where(batch["tokens"] < 4, 23 - batch["tokens"])}
    tasks = [model.task(one) for one in (batch, other)]
    assert not torch.equal(tasks[0].targets, tasks[1].targets) and torch.equal(tasks[0].inputs, tasks[1].inputs)
    states = model.text_decoder(tasks[0].inputs, model.encoder(batch["image"]))
    short = model.text_decoder(tasks[0].inputs[:, :4], model.encoder(batch["image"]))
    torch.testing.assert_close(short, states[:, :4])  # nor on the caption's length


def test_losses_are_the_same_for_one_micro_batch_and_several(batch):
    model = make()
    assert model.counts(batch) == {"caption": 7 + 2 + 0 + 5 + 4}
    assert_micro_batches_add_up(model, batch, [[2], [0, 3], [1, 4]])


def test_captions_are_what_the_decoder_finds_most_likely(batch):
    model = make().eval()
    assert isinstance(model, Captions) and model.check_captions() is None
    tokens_BT, memory_BLD = model.caption(batch["image"]).clone(), model.encoder(batch["image"])
    logits_BTV = model.text_decoder.head(model.text_decoder(tokens_BT, memory_BLD))
    assert_captions_are_likeliest(tokens_BT, logits_BTV)
    assert torch.equal(model.caption(batch["image"], beams=2)[:, 0], torch.ones(5, dtype=torch.int64))
    with pytest.raises(ObjectiveError, match="parallel_share is 1"):
        make(parallel_share=1.0).check_captions()


def test_the_head_begins_at_zero_and_tokens_at_unit_variance():
    torch.manual_seed(0)
    decoder = CapPa(resolve(CapPaConfig(**SIZES)), CONTEXT).text_decoder
    assert not decoder.head.weight.any() and decoder.embed.weight.std().item() == pytest.approx(1.0, abs=0.1)


def test_flops_are_those_that_pytorch_counts():
    model, batch = make(), rows(pairs([6, 6]), 0, 1)  # captions that fill the text length: nothing is padding
    with counted_flops() as counter:
        model.text_decoder.head(model.text_decoder(batch["tokens"], model.encoder(batch["image"])))
    whole = counter.get_total_flops() - 2 * 2 * 2 * 8**2 * 16  # PyTorch counts causal attention whole
    assert model.flops(batch) == pytest.approx(3 * whole, rel=1e-9)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ModelConfigError, match="parallel_share must lie between 0 and 1"):
        resolve(CapPaConfig(**SIZES | {"parallel_share": 1.5}))
    maskless = dataclasses.replace(CONTEXT, vocabulary=Vocabulary(20, 0, 1, 2, None))
    with pytest.raises(ModelConfigError, match="needs a tokenizer with a mask token"):
        CapPa(resolve(CapPaConfig(**SIZES)), maskless)
    CapPa(resolve(CapPaConfig(**SIZES | {"parallel_share": 0.0})), maskless)
