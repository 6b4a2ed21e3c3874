"""FLIP: CLIP's loss on the patches that are left, which positions decide."""

import pytest
import torch
from plain import CONTEXT, ENCODER, pairs

from mug.model import flops
from mug.model.contrastive import pair_loss
from mug.model.objectives.clip import CLIP, CLIPConfig
from mug.model.objectives.flip import FLIP, FLIPConfig
from mug.model.presets import resolve

SIZES = ENCODER | {"text_width": 32, "text_heads": 2, "text_layers": 2, "text_length": 8, "embedding_width": 16}


def make(mask_ratio: float) -> FLIP:
    torch.manual_seed(0)
    return FLIP(resolve(FLIPConfig(**SIZES, mask_ratio=mask_ratio)), CONTEXT)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return pairs([2, 1, 4], length=6) | {"position": torch.tensor([7, 2**40, 9])}


@pytest.mark.parametrize(("mask_ratio", "seen"), [(0.5, 8), (0.75, 4)])
def test_what_is_masked_does_not_matter_and_what_is_seen_does(mask_ratio, seen, batch):
    model = make(mask_ratio)
    visible = model.visible(batch["position"])
    assert visible.shape == (3, seen)
    loss = model(batch)[0]["contrastive"]
    is_seen = torch.zeros(3, 16, dtype=torch.bool).scatter(1, visible, True)
    pixels = is_seen.view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    hidden, shown = (torch.where(where, 255 - batch["image"], batch["image"]) for where in (~pixels, pixels))
    assert torch.equal(model({**batch, "image": hidden})[0]["contrastive"], loss)
    assert not torch.equal(model({**batch, "image": shown})[0]["contrastive"], loss)


def test_the_loss_is_clips_on_the_visible_patches(batch):
    model = make(0.5)
    encoded = model.encoder(batch["image"], model.visible(batch["position"]))
    image = torch.nn.functional.normalize(model.image_projection(encoded[:, 0]), dim=1)
    expected, _ = pair_loss(image, model.embed_text(batch["tokens"]), 1 / 0.07)
    assert model(batch)[0]["contrastive"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_mask_depends_on_the_position_alone(batch):
    model = make(0.5)
    visible = model.visible(batch["position"])
    assert torch.equal(visible[1:2], model.visible(batch["position"][1:2]))
    assert len({tuple(sorted(row)) for row in visible.tolist()}) == 3


def test_evaluation_sees_the_entire_image(batch):
    model, clip = make(0.5), CLIP(resolve(CLIPConfig(**SIZES)), CONTEXT)
    clip.load_state_dict(model.state_dict())  # a run of clip can continue from it
    assert torch.equal(model.embed_image(batch["image"]), clip.embed_image(batch["image"]))


def test_flops_are_clips_less_those_of_the_masked_patches(batch):
    model, clip = make(0.5), CLIP(resolve(CLIPConfig(**SIZES)), CONTEXT)
    saved = flops.encoder(clip.config) - flops.encoder(model.config)
    assert saved > 0 and clip.flops(batch) - model.flops(batch) == pytest.approx(3 * saved)
