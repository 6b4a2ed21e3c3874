"""The image side at the BASE preset against transformers' ViTMAE: same weights, same mask, fp32."""

import dataclasses

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder, ViTMAEEmbeddings

from mug.model.objectives.mug import MUG
from mug.model.positions import sincos_2d

BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
REST = {
    "encoder.cls_token": "vit.embeddings.cls_token",
    "encoder.patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "encoder.norm": "vit.layernorm",
    "pixel_decoder.embed": "decoder.decoder_embed",
    "pixel_decoder.mask_token": "decoder.mask_token",
    "pixel_decoder.norm": "decoder.decoder_norm",
    "pixel_decoder.pred": "decoder.decoder_pred",
}
STACKS = {"encoder.blocks": "vit.layers", "pixel_decoder.blocks": "decoder.decoder_layers"}


def transformers_state(model: MUG) -> dict[str, torch.Tensor]:
    """Our weights under the names of ViTMAEForPreTraining."""
    state = {}
    for name, tensor in model.state_dict().items():
        part, _, kind = name.rpartition(".")
        stack = next((ours for ours in STACKS if name.startswith(ours)), None)
        if stack:
            index, _, inner = part.removeprefix(stack + ".").partition(".")
            layer = f"{STACKS[stack]}.{index}"
            if inner == "attn.qkv":
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    state[f"{layer}.attention.{letter}_proj.{kind}"] = third
            else:
                state[f"{layer}.{BLOCK[inner]}.{kind}"] = tensor
        elif name in REST:
            state[REST[name]] = tensor
        elif part in REST:
            state[f"{REST[part]}.{kind}"] = tensor
    for name, width in [("vit.embeddings.position_embeddings", 768), ("decoder.decoder_pos_embed", 512)]:
        state[name] = torch.cat([torch.zeros(1, width), sincos_2d(width, 14)])[None]
    return state


@pytest.fixture(scope="module")
def oracle(base):
    config = ViTMAEConfig(layer_norm_eps=1e-6, mask_ratio=0.75, attn_implementation="eager")  # the rest is BASE
    with torch.device("meta"):
        oracle = ViTMAEForPreTraining(config).eval()
    oracle.load_state_dict(transformers_state(base), strict=True, assign=True)
    return oracle


@pytest.mark.parametrize("normalize_patches", [True, False])
@torch.inference_mode()
def test_loss_and_predictions_equal_transformers(base, oracle, make_batch, normalized, monkeypatch, normalize_patches):
    batch = make_batch(base, [3, 5])
    batch["image"] = batch["image"] // 4 + (torch.arange(224) // 2).to(torch.uint8)  # patches differ in mean
    config = dataclasses.replace(base.config, normalize_patches=normalize_patches)
    monkeypatch.setattr(base.pixel_decoder, "config", config)
    monkeypatch.setattr(oracle.config, "norm_pix_loss", normalize_patches)
    visible, masked = base.mask(batch["position"])
    noise = torch.cat([visible, masked], dim=1).argsort(dim=1).float()
    expected = oracle(normalized(batch["image"]), noise=noise)
    assert torch.equal(expected.mask.gather(1, masked), torch.ones(2, 147))
    prediction = base.pixel_decoder(base.encoder(batch["image"], visible), visible, masked)
    index = masked[..., None].expand(-1, -1, 768)
    torch.testing.assert_close(prediction, expected.logits.gather(1, index), atol=1e-4, rtol=0)
    losses, _ = base(batch)
    assert abs(losses["pixels"].item() - expected.loss.item()) < 1e-5


def test_positions_equal_those_that_transformers_starts_with():
    config = ViTMAEConfig(num_hidden_layers=0, decoder_num_hidden_layers=0)
    embeddings = ViTMAEEmbeddings(config)
    embeddings.initialize_weights()
    for table, width in [(embeddings.position_embeddings, 768), (ViTMAEDecoder(config, 196).decoder_pos_embed, 512)]:
        assert (table[0, 0] == 0).all()
        torch.testing.assert_close(table[0, 1:], sincos_2d(width, 14), atol=1e-6, rtol=0)
