"""The encoder against timm: same parameter names, same values."""

import pytest
import timm
import torch

from mug.model.positions import sincos_2d


@pytest.fixture(scope="module")
def oracle(base):
    with torch.device("meta"):
        oracle = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    positions = torch.cat([torch.zeros(1, 768), sincos_2d(768, 14)])[None]
    oracle.load_state_dict({**base.encoder.state_dict(), "pos_embed": positions}, strict=True, assign=True)
    return oracle


@pytest.fixture(scope="module")
def image():
    return torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def test_all_patches_equal_timm(base, oracle, image, normalized):
    expected = oracle.forward_features(normalized(image))
    assert expected.std() > 0.5
    torch.testing.assert_close(base.encoder(image), expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_a_masked_subset_equals_timm_blocks_on_the_gathered_tokens(base, oracle, image, normalized):
    visible = torch.stack([torch.randperm(196, generator=torch.Generator().manual_seed(b))[:49] for b in range(2)])
    tokens = oracle.patch_embed(normalized(image)) + oracle.pos_embed[:, 1:]
    tokens = tokens.gather(1, visible[..., None].expand(-1, -1, 768))
    tokens = torch.cat([oracle.cls_token.expand(2, -1, -1), tokens], dim=1)
    expected = oracle.norm(oracle.blocks(tokens))
    torch.testing.assert_close(base.encoder(image, visible), expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_floats_in_0_to_1_equal_uint8(make_model, make_batch):
    model = make_model()
    image = make_batch(model, [1, 2])["image"]
    torch.testing.assert_close(model.encoder(image / 255), model.encoder(image), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_all_patches_named_one_by_one_equal_none(make_model, make_batch):
    model = make_model()
    image = make_batch(model, [1, 2])["image"]
    torch.testing.assert_close(
        model.encoder(image, torch.arange(16).expand(2, -1)), model.encoder(image), atol=1e-6, rtol=0
    )


@torch.inference_mode()
def test_the_order_of_the_visible_patches_only_reorders_the_output(make_model, make_batch):
    model = make_model()
    image = make_batch(model, [1])["image"]
    visible = torch.tensor([[9, 2, 14, 5]])
    out, turned = model.encoder(image, visible), model.encoder(image, visible.flip(1))
    torch.testing.assert_close(out[:, 1:].flip(1), turned[:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, 0], turned[:, 0], atol=1e-5, rtol=0)
