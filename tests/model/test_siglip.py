"""SigLIP: open_clip's loss on its embeddings, its start, and samples without caption."""

import math

import pytest
import torch
from plain import CONTEXT, ENCODER, pairs

from mug.model.objectives.clip import CLIPConfig
from mug.model.objectives.siglip import SigLIP
from mug.model.presets import resolve

SIZES = ENCODER | {"text_width": 32, "text_heads": 2, "text_layers": 2, "text_length": 8, "embedding_width": 16}


@pytest.fixture
def model() -> SigLIP:
    torch.manual_seed(0)
    return SigLIP(resolve(CLIPConfig(**SIZES, causal=False)), CONTEXT)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return pairs([2, 1, 4, 2], length=6)


def test_the_loss_and_every_gradient_are_open_clips(model, batch):
    from open_clip.loss import SigLipLoss

    losses, metrics = model(batch)
    losses["contrastive"].backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    image, text = model.embed_image(batch["image"]), model.embed_text(batch["tokens"])
    expected = SigLipLoss()(image, text, model.scale(), model.bias)
    expected.backward()
    assert losses["contrastive"].item() == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)
    hits = ((image @ text.T).argmax(1) == torch.arange(4)).float().mean()
    assert metrics["accuracy/contrastive"].item() == pytest.approx(hits.item())


def test_scale_and_bias_begin_at_the_papers(model, batch):
    assert model.scale().item() == pytest.approx(10) and model.bias.item() == -10
    # Almost all of the first loss is that of the pairs that belong together.
    image, text = model.embed_image(batch["image"]), model.embed_text(batch["tokens"])
    positive = torch.nn.functional.softplus(10 - 10 * (image * text).sum(1)).mean()
    assert 0 < model(batch)[0]["contrastive"].item() - positive.item() < 3 * math.exp(10 * 0.9 - 10)


def test_the_scale_has_no_maximum(model):
    with torch.no_grad():
        model.scale.log_scale.fill_(math.log(300))
    value = model.scale()
    (-value).sum().backward()
    assert value.item() == pytest.approx(300, rel=1e-4) and model.scale.log_scale.grad.item() < 0


def test_a_sample_without_caption_is_as_if_absent(model, batch):
    without = {**batch, "tokens": batch["tokens"].clone()}
    without["tokens"][2] = 0
    losses, _ = model(without)
    expected, _ = model({name: tensor[[0, 1, 3]] for name, tensor in batch.items()})
    assert losses["contrastive"].item() == pytest.approx(expected["contrastive"].item(), abs=1e-5)
    assert model.counts(without) == {"contrastive": 3}
