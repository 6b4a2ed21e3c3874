"""CLIP: open_clip's loss on its embeddings, and what a caption's padding and absence must not change."""

import pytest
import torch
from plain import CONTEXT, ENCODER, pairs

from mug.model.objectives.clip import CLIP, CLIPConfig
from mug.model.presets import resolve

SIZES = ENCODER | {"text_width": 32, "text_heads": 2, "text_layers": 2, "text_length": 8, "embedding_width": 16}


@pytest.fixture
def model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(resolve(CLIPConfig(**SIZES)), CONTEXT)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return pairs([2, 1, 4, 2], length=6)


def test_the_loss_and_every_gradient_are_open_clips(model, batch):
    from open_clip.loss import ClipLoss

    losses, metrics = model(batch)
    losses["contrastive"].backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    image, text = model.embed_image(batch["image"]), model.embed_text(batch["tokens"])
    expected = ClipLoss()(image, text, model.scale())
    expected.backward()
    assert losses["contrastive"].item() == pytest.approx(expected.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)
    hits = [((image @ text.T).argmax(dim) == torch.arange(4)).float().mean() for dim in (0, 1)]
    assert metrics["accuracy/contrastive"].item() == pytest.approx(sum(hits).item() / 2)


def test_embeddings_have_unit_length_and_know_no_padding(model, batch):
    text = model.embed_text(batch["tokens"])
    longer = torch.nn.functional.pad(batch["tokens"], (0, 2))
    torch.testing.assert_close(model.embed_text(longer), text)
    one_by_one = torch.cat([model.embed_text(row[None][:, : (row != 0).sum()]) for row in batch["tokens"]])
    torch.testing.assert_close(one_by_one, text)
    for embedding in (text, model.embed_image(batch["image"])):
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4))


def test_a_sample_without_caption_is_as_if_absent(model, batch):
    without = {**batch, "tokens": batch["tokens"].clone()}
    without["tokens"][2] = 0
    kept = [0, 1, 3]
    losses, _ = model(without)
    expected, _ = model({name: tensor[kept] for name, tensor in batch.items()})
    assert losses["contrastive"].item() == pytest.approx(expected["contrastive"].item(), abs=1e-6)
    assert model.counts(without) == {"contrastive": 3}


def test_the_scale_begins_at_clips_and_is_not_decayed(model):
    from mug.run.training.groups import parameter_groups
    from mug.run.training.recipe import TrainerConfig

    assert model.scale().item() == pytest.approx(1 / 0.07)
    plain = next(group for group in parameter_groups(model, TrainerConfig()) if group["weight_decay"] == 0)
    assert any(parameter is model.scale.log_scale for parameter in plain["params"])
