"""OpenVision 2: the formulae of arXiv 2509.01644 in float64, sample by sample; the tokens that the decoder sees."""

import pytest
import torch
from plain import (
    ENCODER,
    assert_captions_are_likeliest,
    assert_micro_batches_add_up,
    assert_same_losses_and_gradients,
    block,
    build,
    counted_flops,
    encode,
    norm,
    pairs,
    parameters,
    prefix_mask,
)

from mug.model.objectives.objective import Captions
from mug.model.objectives.openvision2 import OpenVision2, OpenVision2Config
from mug.model.presets import ModelConfigError, resolve

SIZES = ENCODER | {"depth": 1, "text_width": 16, "text_heads": 2, "text_cross_layers": 2, "text_length": 8}


def make(**options) -> OpenVision2:
    return build(OpenVision2, SIZES | options)


def kept(model: OpenVision2, position_B: torch.Tensor) -> torch.Tensor:
    """int64 [B, M], the numbers of the tokens that the decoder sees."""
    numbers_BL1 = torch.arange(17.0).expand(len(position_B), -1)[..., None]
    return model.seen(numbers_BL1, position_B)[..., 0].long()


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_and_every_gradient_are_those_of_the_paper(batch, tied):
    model, nats = make(tied_head=tied), []
    p = parameters(model)
    embed = p["text_decoder.embed.weight"]
    for image, tokens_T, kept_M in zip(batch["image"], batch["tokens"], kept(model, batch["position"]), strict=True):
        tokens_T = tokens_T[tokens_T != 0]
        if len(tokens_T):
            x = embed[tokens_T[:-1]] + p["text_decoder.position_embed"][: len(tokens_T) - 1]
            memory_MD = encode(p, model, image)[kept_M]
            for layer in range(2):
                x = block(p, f"text_decoder.blocks.{layer}", 2, x, prefix_mask(len(x), 0), memory_MD)
            head = embed if tied else p["text_decoder.head.weight"]
            logits_TV = norm(p, "text_decoder.norm", x) @ head.T
            nats.append(-logits_TV.log_softmax(-1)[torch.arange(len(x)), tokens_T[1:]])
    assert_same_losses_and_gradients(model, batch, {"caption": torch.cat(nats).mean()}, p)


def test_the_decoder_sees_the_class_token_and_a_random_part_of_the_others():
    model, position_B = make(), torch.arange(2000)
    kept_BM = kept(model, position_B)
    assert kept_BM.shape == (2000, 1 + 6)  # 0.35 x 16
    assert (kept_BM[:, 0] == 0).all() and (kept_BM.sort(1).values.diff() > 0).all()
    assert (kept_BM[:, 1:].flatten().bincount(minlength=17)[1:] / 2000 - 6 / 16).abs().max() < 0.05
    assert torch.equal(kept(model, position_B[9::50]), kept_BM[9::50])
    assert len(kept(make(kept_tokens=1.0), position_B[:1])[0]) == 17


def test_losses_are_the_same_for_one_micro_batch_and_several(batch):
    model = make()
    assert model.counts(batch) == {"caption": 7 + 2 + 0 + 5}
    assert_micro_batches_add_up(model, batch, [[2], [0, 3], [1]])


def test_captions_are_written_from_all_tokens(batch):
    model = make().eval()
    assert isinstance(model, Captions) and model.check_captions() is None
    tokens_BT, memory_BLD = model.caption(batch["image"]).clone(), model.encoder(batch["image"])
    logits_BTV = model.text_decoder.head(model.text_decoder(tokens_BT, memory_BLD))
    assert_captions_are_likeliest(tokens_BT, logits_BTV)


def test_flops_are_those_that_pytorch_counts():
    model, batch = make(), pairs([6, 6])  # captions that fill the text length: nothing is padding
    with counted_flops() as counter:
        memory_BMD = model.seen(model.encoder(batch["image"]), batch["position"])
        model.text_decoder.head(model.text_decoder(batch["tokens"], memory_BMD))
    whole = counter.get_total_flops() - 2 * 2 * 2 * 8**2 * 16  # PyTorch counts causal attention whole
    assert model.flops(batch) == pytest.approx(3 * whole, rel=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.01, 1.5])
def test_a_share_that_cannot_be_is_refused(share):
    with pytest.raises(ModelConfigError, match="keeps no patch, or more than there are"):
        resolve(OpenVision2Config(**SIZES | {"kept_tokens": share}))
