"""The caption side by value: the loss, what may move a logit, and cached decoding."""

import pytest
import torch

from mug.model.generate import write
from mug.model.text_decoder import pack


def logits_of(model, batch):
    visible, _ = model.mask(batch["position"])
    memory = model.encoder(batch["image"], visible)
    return model.text_decoder.head(model.text_decoder(batch["tokens"], memory))


def flip_patches(image, patches, size):
    """The image with the named patches (int64 [B, M]) inverted."""
    grid = image.shape[-1] // size
    chosen = torch.zeros(len(image), grid**2, dtype=torch.bool).scatter_(1, patches, True)
    pixels = chosen.view(-1, 1, grid, grid).repeat_interleave(size, 2).repeat_interleave(size, 3)
    return torch.where(pixels, 255 - image, image)


@pytest.fixture(scope="module")
def tiny(make_model):
    return make_model("tiny")


@torch.inference_mode()
def test_loss_is_the_cross_entropy_of_the_next_token_without_padding(tiny, make_batch):
    batch = make_batch(tiny, [22, 1, 7])
    losses, report = tiny(batch)
    log_p = logits_of(tiny, batch).double().log_softmax(-1)
    terms, hits = [], []
    for b, row in enumerate(batch["tokens"].tolist()):
        for t in range(row.index(tiny.vocabulary.eos)):
            terms.append(-log_p[b, t, row[t + 1]].item())
            hits.append(log_p[b, t].argmax().item() == row[t + 1])
    assert len(terms) == 23 + 2 + 8 == tiny.counts(batch)["caption"]
    assert losses["caption"].item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert report["accuracy/caption"].item() == pytest.approx(sum(hits) / len(hits))


@torch.inference_mode()
def test_later_tokens_do_not_move_earlier_logits(tiny, make_batch):
    batch = make_batch(tiny, [22, 22])
    before = logits_of(tiny, batch)
    for t in (1, 10, 23):
        tokens = batch["tokens"].clone()
        tokens[:, t:] = 4 + (tokens[:, t:] + 1) % 16
        after = logits_of(tiny, {**batch, "tokens": tokens})
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
        assert ((after - before)[:, t:].abs().amax(-1) > 1e-4).all()


@torch.inference_mode()
def test_pixels_of_masked_patches_do_not_move_a_logit_and_those_of_visible_ones_do(tiny, make_batch):
    batch = make_batch(tiny, [22, 22])
    visible, masked = tiny.mask(batch["position"])
    before = logits_of(tiny, batch)
    hidden_changed = logits_of(tiny, {**batch, "image": flip_patches(batch["image"], masked, 8)})
    assert torch.equal(hidden_changed, before)
    for k in range(visible.shape[1]):
        one_changed = logits_of(tiny, {**batch, "image": flip_patches(batch["image"], visible[:, k : k + 1], 8)})
        assert ((one_changed - before).abs().amax((1, 2)) > 1e-5).all()


@torch.inference_mode()
def test_uni_modal_layers_do_not_see_the_image(make_model, make_batch):
    model = make_model(text_unimodal_layers=2, text_cross_layers=1)
    batch = make_batch(model, [5, 5])
    seen = []
    for block in model.text_decoder.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    logits_of(model, batch)
    logits_of(model, {**batch, "image": 255 - batch["image"]})
    assert torch.equal(seen[0], seen[3]) and torch.equal(seen[1], seen[4])
    assert not torch.equal(seen[2], seen[5])


@torch.inference_mode()
@pytest.mark.parametrize("layers", [(2, 2), (0, 2), (2, 0)])
def test_cached_decoding_equals_the_whole_sequence_at_every_step(make_model, make_batch, layers):
    model = make_model("tiny", text_unimodal_layers=layers[0], text_cross_layers=layers[1])
    batch = make_batch(model, [22, 22, 3])
    memory = model.encoder(batch["image"])
    whole = model.text_decoder(batch["tokens"], memory)
    caches = [{} for _ in model.text_decoder.blocks]
    for t in range(24):
        step = model.text_decoder(batch["tokens"][:, t : t + 1], memory, caches=caches)
        torch.testing.assert_close(
            model.text_decoder.head(step)[:, 0], model.text_decoder.head(whole[:, t]), atol=2e-5, rtol=0
        )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("words", [[22, 22], [22, 1, 7, None]], ids=["full", "padded"])
def test_captions_packed_end_to_end_give_the_states_and_gradients_of_each_alone(tiny, make_batch, words, causal):
    batch = make_batch(tiny, words)
    lengths = (batch["tokens"] != tiny.vocabulary.pad).sum(1)
    memory = torch.randn(len(words), 5, tiny.config.width, generator=torch.Generator().manual_seed(0))
    memory.requires_grad_()
    leaves = [memory, *tiny.text_decoder.parameters()]
    packing = pack(lengths, T=24, L=5)
    states = tiny.text_decoder(batch["tokens"], memory, causal=causal, packing=packing)
    packed = states.split(lengths.clamp(min=1).tolist())  # a row of padding alone keeps one token
    gradients = torch.autograd.grad(
        sum(packed[b][:n].sin().sum() for b, n in enumerate(lengths)), leaves, allow_unused=True
    )
    alone = [
        tiny.text_decoder(batch["tokens"][b : b + 1, :n], memory[b : b + 1], causal=causal)[0]
        for b, n in enumerate(lengths) if n
    ]  # fmt: skip
    kept = [packed[b][:n] for b, n in enumerate(lengths) if n]
    torch.testing.assert_close(kept, alone, atol=2e-5, rtol=0)
    expected = torch.autograd.grad(sum(x.sin().sum() for x in alone), leaves, allow_unused=True)
    for gradient, truth in zip(gradients, expected, strict=True):
        if truth is None:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, truth, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("captioning", ["autoregressive", "masked-language"])
def test_bfloat16_losses_stay_near_fp32(make_model, make_batch, captioning):
    model = make_model("tiny", captioning=captioning)
    batch = make_batch(model, [20, 9, None, 4])
    exact, _ = model(batch)
    rounded, _ = model.bfloat16()(batch)
    for term in model.active:
        assert rounded[term].dtype == torch.float32
        assert rounded[term].item() == pytest.approx(exact[term].item(), rel=2e-2)


def test_counts_are_the_terms_of_each_mean(tiny, make_batch):
    batch = make_batch(tiny, [5, None, 2])
    assert tiny.counts(batch) == {"pixels": 3 * 48, "caption": 6 + 3}


@torch.inference_mode()
def test_padding_that_is_cut_off_does_not_change_the_loss(tiny, make_batch):
    batch = make_batch(tiny, [3, 5])
    cut = {**batch, "tokens": batch["tokens"][:, :7]}
    torch.testing.assert_close(tiny(cut)[0]["caption"], tiny(batch)[0]["caption"], atol=1e-6, rtol=0)


def test_a_batch_of_four_is_learnt_word_for_word(make_model, make_batch):
    model = make_model(width=64, text_width=64, noise=0)
    batch = make_batch(model, [6, 6, 4, 2])
    batch["tokens"][:, 1] = 9  # the first word alone does not tell the captions apart
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        losses, report = model(batch)
        (losses["pixels"] + losses["caption"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses["caption"].item() < 0.05 and report["accuracy/caption"].item() == 1
    with torch.inference_mode():
        memory = model.encoder(batch["image"], model.mask(batch["position"])[0])
        for beams in range(1, 5):
            assert torch.equal(write(model.text_decoder, model.vocabulary, memory, beams), batch["tokens"])
        flipped = write(model.text_decoder, model.vocabulary, memory.flip(0))
        assert torch.equal(flipped, batch["tokens"].flip(0))  # it is the image that decides
