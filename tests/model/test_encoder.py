"""The encoder against timm: same parameter names, same values."""

import plain
import pytest
import timm
import torch
from noise import noisy
from plain import prefix_mask

from mug.model.positions import sincos_2d
from mug.model.vit import Block


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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [None, (4, 1, 6)])
def test_a_block_sees_a_prefix_what_comes_before_or_both(causal, keys):
    torch.manual_seed(0)
    block, x_BND = noisy(Block(16, 2)), torch.randn(3, 6, 16)
    p = {f"b.{name}": value.detach().double() for name, value in block.named_parameters()}
    found = block(x_BND, None if keys is None else torch.tensor(keys), causal)
    for b in range(3):
        prefix = 0 if keys is None and causal else 6 if keys is None else keys[b]
        sees_NN = prefix_mask(6, prefix) if causal else (torch.arange(6) < prefix).expand(6, 6)
        expected = plain.block(p, "b", 2, x_BND[b].double(), sees_NN)
        torch.testing.assert_close(found[b].double(), expected, rtol=1e-5, atol=1e-6)


def test_words_follow_the_patches_and_are_seen_by_all(make_model):
    encoder = make_model().encoder
    image = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words_BTD = torch.randn(2, 3, 32)
    alone, keys_B = encoder(image), torch.tensor([17, 20])
    both = encoder(image, words_BTD=words_BTD, keys_B=keys_B)
    assert both.shape == (2, 20, 32)
    torch.testing.assert_close(both[0, :17], alone[0])  # its words are padding
    assert not torch.allclose(both[1, :17], alone[1], atol=1e-3)
