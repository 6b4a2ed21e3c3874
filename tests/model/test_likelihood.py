"""Every objective that writes captions scores them as a plain loop does; captioners show where they look."""

import dataclasses

import pytest
import torch
from plain import build, pairs

from mug.model.multilingual import fused_rows
from mug.model.objectives.objective import (
    Captions,
    Objective,
    ScoresCaptions,
    ShowsAttention,
    find_objective,
    objective_names,
)

SIZES = {"image_size": 16, "patch_size": 4, "width": 16, "heads": 2, "depth": 2}
SIZES |= {"pixel_width": 16, "pixel_depth": 1, "pixel_heads": 2, "text_width": 16, "text_heads": 2, "text_length": 8}
SIZES |= {"text_unimodal_layers": 1, "text_cross_layers": 1, "text_layers": 1, "embedding_width": 8}
SIZES |= {"fusion_layers": 1, "decoder_layers": 1}
SIZES |= {"image_queries": 4, "parallel_share": 0.0, "kept_tokens": 1.0}  # in training, too, captions are of all tokens
WRITERS = [name for name in objective_names() if hasattr(find_objective(name), "caption")]


def make(name: str, **options) -> Objective:
    objective = find_objective(name)
    known = {field.name for field in dataclasses.fields(objective.Config)}
    sizes = {size: value for size, value in (SIZES | options).items() if size in known}
    return build(objective, sizes).eval()


def hidden(model: Objective, name: str, image: torch.Tensor, text_1T: torch.Tensor) -> torch.Tensor:
    """Returns the states of image and words, or of the words, [1, ..., D], without caches."""
    if name == "aimv2":
        return model.decoder(text_1T, model.encoder(image))
    if name == "coca":
        return model.text_decoder(text_1T, model.caption_pooler(model.encoder(image)))
    if name == "genlip":
        words = {"words_BTD": model.token_embed(text_1T), "keys_B": torch.tensor([17]), "causal": True}
        return model.encoder(image, **words)
    if name == "unix2":
        nothing_12 = torch.tensor([[1, 2]])  # BOS EOS: no words besides the image
        row_F, _ = fused_rows(torch.tensor([2]), 0, 17, 1)
        memory_FD, _ = model._fuse(model.encoder(image), model._read(nothing_12)[0], row_F, torch.tensor([1 + 17 + 2]))
        return model.decoder(text_1T, memory_FD[None])
    return model.text_decoder(text_1T, model.encoder(image))


@pytest.fixture
def images() -> torch.Tensor:
    return pairs([3, 3], size=16)["image"]


@pytest.fixture
def captions() -> torch.Tensor:
    return pairs([1, 4, 6])["tokens"]


@pytest.mark.parametrize("name", WRITERS)
@torch.inference_mode()
def test_scores_are_a_plain_loop(name, images, captions):
    """One image and one caption at a time, each word given those before it alone."""
    model = make(name)
    head = (
        model.head if name in ("genlip", "unix2") else (model.decoder if name == "aimv2" else model.text_decoder).head
    )
    assert isinstance(model, ScoresCaptions)
    found = model.caption_log_likelihoods(images, captions)
    assert found.shape == (2, 3) and found.dtype == torch.float32
    for b, c in ((b, c) for b in range(2) for c in range(3)):
        text_T, total = captions[c][captions[c] != 0], 0.0
        for t in range(1, len(text_T)):
            states = hidden(model, name, images[b : b + 1], text_T[None, :t])
            total += head(states[0, -1]).double().log_softmax(0)[text_T[t]].item()
        assert found[b, c].item() == pytest.approx(total, rel=1e-4)
    assert not torch.allclose(found[0], found[1], rtol=1e-5), "the image counts"


@pytest.mark.parametrize("name", ["cappa", "coca", "genlip", "openvision2"])
@torch.inference_mode()
def test_scores_are_the_loss_that_is_learned(name, images, captions):
    """The mean over the tokens of one caption. AIMv2 and MUG see less of the image in training."""
    model = make(name)
    found = model.caption_log_likelihoods(images, captions)
    for b, c in ((b, c) for b in range(2) for c in range(3)):
        batch = {"image": images[b : b + 1], "tokens": captions[c : c + 1], "position": torch.tensor([7])}
        tokens = int((captions[c] != 0).sum()) - 1
        assert found[b, c].item() == pytest.approx(-tokens * model(batch)[0]["caption"].item(), rel=1e-4)


@torch.inference_mode()
def test_openvision2_scores_by_all_tokens_of_the_image(images, captions):
    some, every = (make("openvision2", kept_tokens=share) for share in (0.35, 1.0))
    assert torch.equal(*(model.caption_log_likelihoods(images, captions) for model in (some, every)))


def test_what_writes_no_captions_scores_none():
    assert WRITERS == ["aimv2", "cappa", "coca", "genlip", "mug", "openvision2", "unix2"]
    for name in ("m3ae", "clip", "mae"):
        assert not isinstance(make(name), ScoresCaptions | Captions)


@pytest.mark.parametrize("name", ["cappa", "openvision2"])
@torch.inference_mode()
def test_captioners_show_where_they_look(name, images, captions):
    """With one head, what the last layer reads is the tokens' values by these weights; the class token has the rest."""
    model, image, tokens_BT = make(name, text_heads=1), images[:1], captions[2:]
    assert isinstance(model, ShowsAttention)
    weights_TN, layer, read = model.word_attention(image, tokens_BT)[0], model.text_decoder.blocks[-1].cross_attn, []
    handle = layer.proj.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0][0]))
    memory_BLD = model.encoder(image)
    model.text_decoder(tokens_BT, memory_BLD)
    handle.remove()
    weights_TL = torch.cat([1 - weights_TN.sum(-1, keepdim=True), weights_TN], dim=-1)
    torch.testing.assert_close(weights_TL[1:] @ layer.kv(memory_BLD)[0].chunk(2, -1)[1], read[0][:-1])
    assert make(name, text_cross_layers=0).word_attention(image, tokens_BT) is None
