"""AIMv2: the formulae of arXiv 2411.14402 in float64, sample by sample; prefixes, what is seen, captions."""

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
    linear,
    norm,
    pairs,
    parameters,
    patches,
    prefix_mask,
    rows,
    standardized,
    with_one_loss,
)

from mug.model.objectives.aimv2 import AIMv2, AIMv2Config
from mug.model.objectives.objective import Captions, ObjectiveError
from mug.model.presets import ModelConfigError, resolve

SIZES = ENCODER | {"text_width": 16, "text_heads": 2, "text_layers": 2, "text_length": 8}


def make(**options) -> AIMv2:
    return build(AIMv2, SIZES | options)


def expected(model: AIMv2, p: dict, batch: dict) -> dict[str, torch.Tensor]:
    squares, nats = [], []
    for image, tokens_T, prefix in zip(batch["image"], batch["tokens"], model.prefix(batch["position"]), strict=True):
        tokens_T = tokens_T[tokens_T != 0]
        memory_LD = encode(p, model, image, sees_NN=prefix_mask(17, 1 + int(prefix)))
        text_TD = p["decoder.embed.weight"][tokens_T] + p["decoder.position_embed"][: len(tokens_T)]
        x = torch.cat([linear(p, "decoder.embed_image", memory_LD), text_TD])
        for layer in range(2):
            x = block(p, f"decoder.blocks.{layer}", 2, x, prefix_mask(len(x), 0))
        x = norm(p, "decoder.norm", x)
        target_NP = standardized(patches(image, 8))
        prediction_NP = linear(p, "decoder.pred", x[:16])  # of the class token and all patches but the last
        squares.append((prediction_NP - target_NP)[prefix:].square().flatten())
        if len(tokens_T):
            logits_TV = x[17:-1] @ p["decoder.head.weight"].T
            nats.append(-logits_TV.log_softmax(-1)[torch.arange(len(logits_TV)), tokens_T[1:]])
    return {"pixels": torch.cat(squares).mean(), "caption": torch.cat(nats).mean()}


def test_losses_and_every_gradient_are_those_of_the_paper(batch):
    model = make()
    p = parameters(model)
    assert_same_losses_and_gradients(model, batch, expected(model, p, batch), p)


def test_prefixes_are_uniform_and_drawn_by_position_alone(batch):
    model = make()
    many = torch.arange(6000)
    prefix = model.prefix(many)
    counts = prefix.bincount(minlength=17)
    assert counts[0] == counts[16] == 0 and (counts[1:16] - 400).abs().max() < 90
    assert torch.equal(model.prefix(many[5::7]), prefix[5::7])
    assert model.counts(batch)["pixels"] == int((16 - model.prefix(batch["position"])).sum())
    assert model.counts(batch)["caption"] == 7 + 2 + 0 + 5


def test_no_prediction_sees_its_patch_or_its_token(batch):
    model = make()
    batch = rows(batch, 0)
    prefix = int(model.prefix(batch["position"]))
    assert prefix < 14
    losses, image = model(batch)[0], batch["image"].double() / 255
    image.requires_grad_()
    keys_B = torch.tensor([1 + prefix])
    encoded = model.double().encoder(image, keys_B=keys_B, causal=True)
    hidden = model.decoder(batch["tokens"], encoded)
    seen = []
    for patch in range(prefix, 16):  # the token numbered like it predicts it
        (gradient,) = torch.autograd.grad(hidden[0, patch].square().sum(), image, retain_graph=True)
        grid = gradient[0].unfold(1, 8, 8).unfold(2, 8, 8).abs().amax((0, 3, 4)).flatten()
        seen.append((grid > 0).tolist())
    assert seen == [[key < patch for key in range(16)] for patch in range(prefix, 16)]
    assert losses["pixels"] > 0


def test_losses_are_the_same_for_one_micro_batch_and_several(batch):
    assert_micro_batches_add_up(make(), batch, [[2], [0, 3], [1]])


def test_captions_are_what_the_decoder_finds_most_likely(batch):
    model = make().eval()
    assert isinstance(model, Captions) and model.check_captions() is None
    tokens_BT, memory_BLD = model.caption(batch["image"]).clone(), model.encoder(batch["image"])
    logits_BTV = model.decoder.head(model.decoder(tokens_BT, memory_BLD)[:, 17:])
    assert_captions_are_likeliest(tokens_BT, logits_BTV)

    def mean_log_p(tokens_BT):
        logits = model.decoder.head(model.decoder(tokens_BT, memory_BLD)[:, 17:])
        logits[..., :2] = -torch.inf
        log_p = logits[:, :-1].log_softmax(-1).gather(2, tokens_BT[:, 1:, None])[..., 0]
        written = tokens_BT[:, 1:] != 0
        return log_p.masked_fill(~written, 0).sum(1) / written.sum(1)

    searched = model.caption(batch["image"], beams=40).clone()
    assert (mean_log_p(searched) >= mean_log_p(tokens_BT) - 1e-6).all()


@pytest.mark.parametrize(("loss", "absent"), [("pixels", "decoder.head.weight"), ("caption", "decoder.pred.weight")])
def test_a_head_that_does_not_train_is_not_built(batch, loss, absent):
    whole = make()
    alone = with_one_loss(whole, loss, absent)
    losses, _ = alone(batch)
    assert list(losses) == list(alone.counts(batch)) == [loss]
    torch.testing.assert_close(losses[loss], whole(batch)[0][loss])  # the image sees no token
    assert alone.reads_captions == (loss == "caption")
    losses[loss].backward()
    assert all(parameter.grad is not None for parameter in alone.parameters())
    if loss == "pixels":
        with pytest.raises(ObjectiveError, match=r"loss_weights\.caption is 0"):
            alone.check_captions()


def test_flops_are_those_that_pytorch_counts_less_what_masks_hide():
    model, batch = make(), pairs([6, 6])  # captions that fill the text length: nothing is padding
    prefix_B = model.prefix(batch["position"])
    with counted_flops() as counter:
        encoded = model.encoder(batch["image"])
        hidden = model.decoder(batch["tokens"], encoded)
        for b, prefix in enumerate(prefix_B):
            model.decoder.pred(hidden[b, prefix:16])
            model.decoder.head(hidden[b, 17:-1])
    hidden_pairs = 2 * int((17**2 - (1 + prefix_B) ** 2).sum()) * 32 / 2  # 2 layers
    hidden_pairs += 2 * 2 * 25**2 * 16 / 2  # of 2 samples and 2 layers
    whole = counter.get_total_flops() - 2 * 2 * hidden_pairs
    assert model.flops(batch) == pytest.approx(3 * whole, rel=1e-9)


def test_one_patch_is_refused():
    with pytest.raises(ModelConfigError, match="no next one"):
        resolve(AIMv2Config(**SIZES | {"patch_size": 32}))
