"""M3AE: the formulae of arXiv 2205.14204 in float64, sample by sample; masks, counts, and samples without caption."""

import pytest
import torch
from plain import (
    ENCODER,
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
    rows,
    with_one_loss,
)

from mug.model.objectives.m3ae import M3AE, M3AEConfig
from mug.model.objectives.objective import Reconstructs
from mug.model.presets import ModelConfigError, resolve

SIZES = ENCODER | {"text_length": 8}
SIZES |= {"pixel_width": 16, "pixel_depth": 1, "pixel_heads": 2, "mask_ratio": 0.5, "word_mask_ratio": 0.6}


def make(**options) -> M3AE:
    return build(M3AE, SIZES | options)


def expected(model: M3AE, p: dict, batch: dict) -> dict[str, torch.Tensor]:
    """Both losses, of one visible set of patches and words after the other."""
    squares, nats = [], []
    visible_BK, masked_BM = model.mask(batch["position"])
    words = model.words(batch["tokens"], batch["position"])
    positions_TD, decoder = model.word_embed.positions_TD.double(), model.decoder
    for b, image in enumerate(batch["image"]):
        seen, count = int(words.visible_B[b]), int(words.count_B[b])
        place_S, tokens_S = words.place_BS[b, :count], words.tokens_BS[b, :count]
        word_SD = p["word_embed.embed.weight"][tokens_S] + positions_TD[place_S] + p["word_embed.type_D"]
        x = linear(p, "decoder.embed", encode(p, model, image, visible_BK[b], word_SD[:seen]))
        K, M = visible_BK.shape[1], masked_BM.shape[1]
        image_ND = torch.cat([x[1 : 1 + K], p["decoder.mask_token"][0].expand(M, -1)])
        image_ND = image_ND + decoder.positions_ND.double()[torch.cat([visible_BK[b], masked_BM[b]])]
        text_SD = torch.cat([x[1 + K :], p["decoder.word_mask_token"][0].expand(count - seen, -1)])
        text_SD = text_SD + decoder.positions_TD.double()[place_S] + p["decoder.word_type_D"]
        x = torch.cat([x[:1], image_ND + p["decoder.image_type_D"], text_SD])
        x = block(p, "decoder.blocks.0", 2, x, torch.ones(len(x), len(x), dtype=torch.bool))
        x = norm(p, "decoder.norm", x)
        prediction_MP = linear(p, "decoder.pred", x[1 + K : 1 + K + M])
        squares.append((prediction_MP - patches(image, 8)[masked_BM[b]]).square().flatten())
        logits_SV = x[1 + K + M + seen :] @ p["decoder.head.weight"].T
        nats.append(-logits_SV.log_softmax(-1)[torch.arange(count - seen), tokens_S[seen:]])
    return {"pixels": torch.cat(squares).mean(), "caption": torch.cat(nats).mean()}


def test_losses_and_every_gradient_are_those_of_the_paper(batch):
    model = make()
    p = parameters(model)
    assert_same_losses_and_gradients(model, batch, expected(model, p, batch), p)


def test_words_are_hidden_at_random_by_position_alone(batch):
    model = make()
    words = model.words(batch["tokens"], batch["position"])
    assert words.count_B.tolist() == [6, 1, 0, 4] and words.visible_B.tolist() == [2, 0, 0, 2]  # 3.6, 0.6, 0, 2.4
    assert model.config.words == 6 and model.config.visible_words == 2
    for b, (count, caption) in enumerate(zip([6, 1, 0, 4], batch["tokens"], strict=True)):
        assert sorted(words.place_BS[b, :count].tolist()) == list(range(1, count + 1))
        assert torch.equal(words.tokens_BS[b, :count], caption[words.place_BS[b, :count]])
    alone = model.words(batch["tokens"][3:], batch["position"][3:])
    assert torch.equal(alone.place_BS[0, :4], words.place_BS[3, :4])
    firsts = [model.words(batch["tokens"][:1], torch.tensor([at])).place_BS[0, 0].item() for at in range(60)]
    assert set(firsts) == {1, 2, 3, 4, 5, 6}
    assert model.counts(batch) == {"pixels": 4 * 8, "caption": 4 + 1 + 0 + 2}


def test_hidden_words_and_patches_do_not_reach_the_prediction(batch):
    model = make()
    words = model.words(batch["tokens"], batch["position"])
    visible_BK, masked_BM = model.mask(batch["position"])
    before = model._decode(batch["image"], visible_BK, masked_BM, words)
    other = words._replace(tokens_BS=words.tokens_BS.where(~words.hidden_BS, 9))
    image = batch["image"].clone()
    image[0, :, 8 * (masked_BM[0, 0] // 4) :][:, :8, 8 * (masked_BM[0, 0] % 4) :][..., :8] = 0
    after = model._decode(image, visible_BK, masked_BM, other)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    seen = words._replace(tokens_BS=words.tokens_BS.where(words.hidden_BS, 9))
    assert not torch.equal(model._decode(batch["image"], visible_BK, masked_BM, seen)[0], before[0])


def test_losses_are_the_same_for_one_micro_batch_and_several(batch):
    assert_micro_batches_add_up(make(), batch, [[2], [0, 3], [1]])


def test_an_image_is_reconstructed_as_a_sample_without_caption(batch):
    model = make().eval()
    assert isinstance(model, Reconstructs)
    masked, painted = model.reconstruct(batch["image"], batch["position"])
    visible_BK, masked_BM = model.mask(batch["position"])
    words = model.words(torch.zeros(4, 8, dtype=torch.int64), batch["position"])
    prediction = model.decoder.pred(model._decode(batch["image"], visible_BK, masked_BM, words)[0])
    row, column = divmod(masked_BM[2, 0].item(), 4)
    patch = (2, slice(None), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
    std, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
    pixels = ((prediction[2, 0].view(8, 8, 3) * std + mean) * 255).round().clamp(0, 255)
    assert torch.equal(painted[patch], pixels.permute(2, 0, 1).byte()) and (masked[patch] == 128).all()


@pytest.mark.parametrize(("loss", "absent"), [("pixels", "decoder.head.weight"), ("caption", "decoder.pred.weight")])
def test_a_head_that_does_not_train_is_not_built(batch, loss, absent):
    whole = make()
    alone = with_one_loss(whole, loss, absent)
    losses, _ = alone(batch)
    assert list(losses) == list(alone.counts(batch)) == [loss] and torch.equal(losses[loss], whole(batch)[0][loss])
    masked, painted = alone.reconstruct(batch["image"], batch["position"])
    assert torch.equal(masked, painted) == (loss == "caption")


def test_flops_are_those_that_pytorch_counts():
    model = make(word_mask_ratio=0.5)
    batch = model.prepare(rows(pairs([6, 6]), 0, 1))  # captions that fill the text length: nothing is padding
    with counted_flops() as counter:
        model(batch)
    assert model.flops(batch) == pytest.approx(3 * counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"word_mask_ratio": 1.0}, "model.word_mask_ratio must lie between 0 and 1"), ({"text_length": 2}, "at least 3")],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ModelConfigError, match=message):
        resolve(M3AEConfig(**SIZES | options))
