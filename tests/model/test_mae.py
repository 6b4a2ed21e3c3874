"""MAE: transformers' ViTMAE computes its loss with the same weights and mask."""

import dataclasses

import pytest
import torch
from plain import ENCODER, build, pairs
from test_interchange import vitmae_config
from transformers import ViTMAEForPreTraining

from mug.model import interchange
from mug.model.objectives.mae import MAE

SIZES = ENCODER | {"pixel_width": 32, "pixel_depth": 1, "pixel_heads": 2}


@pytest.fixture(params=[True, False], ids=["normalised patches", "raw patches"])
def model(request) -> MAE:
    return build(MAE, SIZES | {"normalize_patches": request.param}).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return pairs([None] * 3)


def vitmae(model: MAE) -> ViTMAEForPreTraining:
    theirs = ViTMAEForPreTraining(vitmae_config(model.config))
    names = interchange.as_mae(theirs.state_dict())
    ours = interchange.to_mae(model)
    assert {name: value.shape for name, value in names.items()} == {name: value.shape for name, value in ours.items()}
    return theirs


def test_the_loss_and_its_gradient_are_those_of_transformers(model, batch, tmp_path):
    from safetensors.torch import save_file

    theirs = vitmae(model)
    theirs.config.save_pretrained(tmp_path)
    save_file(interchange.to_vitmae(interchange.to_mae(model)), tmp_path / "model.safetensors", {"format": "pt"})
    theirs = ViTMAEForPreTraining.from_pretrained(tmp_path).eval()
    visible_BK, masked_BM = model.mask(batch["position"])
    noise_BN = torch.zeros(3, model.config.patches).scatter(1, masked_BM, 1.0)
    noise_BN = noise_BN.scatter_add(1, visible_BK, 0.01 * torch.arange(visible_BK.shape[1]).float().expand(3, -1))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    expected = theirs((batch["image"] / 255 - mean) / std, noise=noise_BN).loss
    losses, _ = model(batch)
    assert losses["pixels"].item() == pytest.approx(expected.item(), abs=1e-5)
    losses["pixels"].backward()
    expected.backward()
    ours = model.encoder.blocks[0].mlp.fc1.weight.grad
    torch.testing.assert_close(ours, theirs.vit.layers[0].mlp.fc1.weight.grad, rtol=1e-4, atol=1e-6)


def test_counts_masks_and_pictures(model, batch):
    visible_BK, masked_BM = model.mask(batch["position"])
    assert model.counts(batch) == {"pixels": masked_BM.numel()} and model.config.visible == visible_BK.shape[1] == 4
    other = MAE(model.config, dataclasses.replace(model.context, seed=6))
    assert not torch.equal(other.mask(batch["position"])[0], visible_BK)
    masked, painted = model.reconstruct(batch["image"], batch["position"])
    first = divmod(visible_BK[0, 0].item(), 4)
    patch = (0, slice(None), slice(8 * first[0], 8 * first[0] + 8), slice(8 * first[1], 8 * first[1] + 8))
    assert torch.equal(masked[patch], batch["image"][patch]) and torch.equal(painted[patch], batch["image"][patch])
    assert (masked == 128).flatten(1).float().mean(1).tolist() == pytest.approx([12 / 16] * 3, abs=0.02)
