"""CoCa: open_clip's loss, what the class token sees, and captions written a word at a time as they were learned."""

import dataclasses

import pytest
import torch
from plain import CONTEXT, ENCODER, build, pairs

from mug.model.objectives.coca import CoCa, CoCaConfig
from mug.model.objectives.objective import Captions, Context, EmbedsPairs, ObjectiveError
from mug.model.presets import Vocabulary, resolve

SIZES = ENCODER | {"image_queries": 5, "embedding_width": 16, "text_width": 48, "text_heads": 2, "text_length": 8}
SIZES |= {"text_unimodal_layers": 2, "text_cross_layers": 2}


def make(context: Context = CONTEXT) -> CoCa:
    return build(CoCa, SIZES, context)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return pairs([2, 1, 4, 2], length=6)


def logits_of(model: CoCa, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, T, V], with padding and without class tokens."""
    memory = model.caption_pooler(model.encoder(batch["image"]))
    return model.text_decoder.head(model.text_decoder(batch["tokens"], memory))


def test_losses_and_every_gradient_are_open_clips(batch):
    from open_clip.loss import CoCaLoss

    model = make()
    losses, _ = model(batch)
    (losses["contrastive"] + 2 * losses["caption"]).backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    image, text, logits = model.embed_image(batch["image"]), model.embed_text(batch["tokens"]), logits_of(model, batch)
    expected = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0)(
        image, text, logits[:, :-1], batch["tokens"][:, 1:], model.scale()
    )
    sum(expected).backward()
    assert losses["contrastive"].item() == pytest.approx(expected[0].item(), abs=1e-6)
    assert 2 * losses["caption"].item() == pytest.approx(expected[1].item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert model.counts(batch) == {"contrastive": 4, "caption": 3 + 2 + 5 + 3}


def test_the_class_token_reads_all_of_its_own_caption_and_padding_is_not_seen(batch):
    model, tokens = make(), batch["tokens"]
    text = model.embed_text(tokens)
    for row, column in ((0, 1), (0, 2), (2, 4)):
        changed = tokens.clone()
        changed[row, column] = 13
        others = [i for i in range(4) if i != row]
        found = model.embed_text(changed)
        assert torch.equal(found[others], text[others]) and (found[row] - text[row]).abs().max() > 1e-3
    torch.testing.assert_close(model.embed_text(torch.nn.functional.pad(tokens, (0, 2))), text)
    torch.testing.assert_close(model.embed_text(tokens[1:2, :3]), text[1:2])


def test_words_do_not_see_the_class_token(batch):
    model = make()
    loss = model(batch)[0]["caption"]
    loss.backward()
    assert model.text_decoder.unimodal.cls_token.grad.abs().max() == 0
    assert model.text_decoder.unimodal.norm.weight.grad is None


def test_a_sample_without_caption_is_as_if_absent(batch):
    model, kept = make(), [0, 1, 3]
    without = {**batch, "tokens": batch["tokens"].clone()}
    without["tokens"][2] = 0
    losses, _ = model(without)
    expected, _ = model({name: tensor[kept] for name, tensor in batch.items()})
    for name in ("contrastive", "caption"):
        assert losses[name].item() == pytest.approx(expected[name].item(), abs=1e-6)
    assert model.counts(without) == {"contrastive": 3, "caption": 8}


@torch.no_grad()
def test_captions_are_written_as_they_were_learned(batch):
    """The words that it writes one at a time are those that it gives the highest logits when it reads them all."""
    model = make()
    assert isinstance(model, Captions) and isinstance(model, EmbedsPairs)
    written = model.caption(batch["image"])
    logits = logits_of(model, {"image": batch["image"], "tokens": written})
    logits[..., [0, 1]] = -torch.inf  # never written
    for words, best in zip(written, logits.argmax(2), strict=True):
        end = int((words != 0).sum())
        assert words[0] == 1 and words[1:end].tolist() == best[: end - 1].tolist()
    torch.testing.assert_close(model.caption(batch["image"], beams=1), written)
    assert model.caption(batch["image"], beams=3).shape == written.shape


@pytest.mark.parametrize("loss", ["contrastive", "caption"])
def test_a_loss_that_is_not_active_is_not_computed(loss, batch):
    context, whole = dataclasses.replace(CONTEXT, losses=(loss,)), make()
    model = make(context)
    losses, _ = model(batch)
    assert losses.keys() == model.counts(batch).keys() == {loss}
    assert torch.equal(losses[loss], whole(batch)[0][loss])
    assert 0 < model.flops(batch) < whole.flops(batch)
    if loss == "contrastive":
        with pytest.raises(ObjectiveError, match=r"never learned to write captions: its loss_weights\.caption is 0"):
            model.check_captions()


def test_flops_are_those_of_a_base_model():
    """Of ViT-B/16 and 6 + 6 layers, 64 tokens: 159 GFLOP with the image's 197 states as memory; here 256 queries, and
    the two poolers."""
    with torch.device("meta"):
        model = CoCa(resolve(CoCaConfig("base")), Context(vocabulary=Vocabulary(30522, 0, 1, 2, 3)))
    batch = {"tokens": torch.full((2, 64), 5)}
    D, L, Q, T = 768, 197, 256, 64
    poolers = sum(2 * D * D * (q + m) + 2 * q * m * D for q, m in ((Q, L), (1, Q)))
    wider_memory = 6 * (2 * D * D * (Q - L) + 2 * T * (Q - L) * D)
    assert model.flops(batch) / 2 == pytest.approx(159.0e9 + 6 * (poolers + wider_memory), rel=0.01)
