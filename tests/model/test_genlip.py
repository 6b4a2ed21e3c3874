"""GenLIP: the formulae of arXiv 2605.00809 in float64, sample by sample; what sees what; captions."""

import pytest
import torch
from plain import (
    ENCODER,
    assert_micro_batches_add_up,
    assert_same_losses_and_gradients,
    build,
    counted_flops,
    encode,
    pairs,
    parameters,
    prefix_mask,
)

from mug.model.objectives.genlip import GenLIP, GenLIPConfig
from mug.model.objectives.objective import Captions
from mug.model.presets import ModelConfigError, resolve

SIZES = ENCODER | {"text_length": 8}


@pytest.fixture
def model() -> GenLIP:
    return build(GenLIP, SIZES)


def test_the_loss_and_every_gradient_are_those_of_the_paper(model, batch):
    p, nats = parameters(model), []
    for image, tokens_T in zip(batch["image"], batch["tokens"], strict=True):
        tokens_T = tokens_T[tokens_T != 0]
        if count := len(tokens_T[:-1]):
            word_TD = p["token_embed.embed.weight"][tokens_T[:-1]] + p["token_embed.position_embed"][:count]
            state_TD = encode(p, model, image, words_WD=word_TD, sees_NN=prefix_mask(17 + count, 17))[17:]
            logits_TV = state_TD @ p["head.weight"].T
            nats.append(-logits_TV.log_softmax(-1)[torch.arange(count), tokens_T[1:]])
    assert_same_losses_and_gradients(model, batch, {"caption": torch.cat(nats).mean()}, p)


def test_an_image_is_encoded_as_without_its_caption(model, batch):
    words_BTD, prefix_B = model.token_embed(batch["tokens"]), torch.full((4,), 17)
    both = model.encoder(batch["image"], words_BTD=words_BTD, keys_B=prefix_B, causal=True)
    torch.testing.assert_close(both[:, :17], model.encoder(batch["image"]))


def test_losses_are_the_same_for_one_micro_batch_and_several(model, batch):
    assert model.counts(batch) == {"caption": 7 + 2 + 0 + 5}
    assert_micro_batches_add_up(model, batch, [[2], [0, 3], [1]])


def mean_log_p(model: GenLIP, image: torch.Tensor, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of captions; and log-probabilities [B, T - 1, V] of what follows each token, PAD and BOS left out."""
    logits_BTV = model.head(model._states(image, tokens_BT))[:, :-1]
    logits_BTV[..., :2] = -torch.inf
    log_p, written_BT = logits_BTV.log_softmax(-1), tokens_BT[:, 1:] != 0
    of_tokens = log_p.gather(2, tokens_BT[:, 1:, None])[..., 0].masked_fill(~written_BT, 0)
    return of_tokens.sum(1) / written_BT.sum(1), log_p


def test_captions_are_what_the_model_finds_most_likely(model, batch):
    assert isinstance(model, Captions) and model.check_captions() is None
    greedy = model.caption(batch["image"]).clone()
    with torch.no_grad():
        likelihood, log_p = mean_log_p(model, batch["image"], greedy)
        written_BT = greedy[:, 1:] != 0
        assert torch.equal(log_p.argmax(-1)[written_BT], greedy[:, 1:][written_BT])
        searched = model.caption(batch["image"], beams=40).clone()
        assert (mean_log_p(model, batch["image"], searched)[0] >= likelihood - 1e-6).all()


def test_flops_are_those_that_pytorch_counts_less_what_masks_hide(model):
    batch = pairs([6, 6])  # captions that fill the text length: nothing is padding
    with counted_flops() as counter:
        encoded = model.encoder(batch["image"], words_BTD=model.token_embed(batch["tokens"]))
        model.head(encoded[:, 17:-1])
    hidden = 2 * 2 * (25**2 - 17**2) / 2  # of 2 samples and 2 layers
    whole = counter.get_total_flops() - 2 * 2 * hidden * 32
    assert model.flops(batch) == pytest.approx(3 * whole, rel=1e-9)


def test_a_caption_without_room_is_refused():
    with pytest.raises(ModelConfigError, match=r"model\.text_length must be at least 2"):
        resolve(GenLIPConfig(**SIZES | {"text_length": 1}))
