"""Gradients reach every parameter, and both decoders run whatever the batch holds."""

import dataclasses

import pytest
import torch

from mug.model.objectives.mug import MUG

both_tasks = pytest.mark.parametrize("captioning", ["autoregressive", "masked-language"])


def backward(model, batch):
    losses, report = model(batch)
    (losses["pixels"] + 0.1 * losses["caption"]).backward()
    return losses, report


@both_tasks
@pytest.mark.parametrize("tied_head", [True, False])
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(make_model, make_batch, captioning, tied_head):
    model = make_model("tiny", captioning=captioning, tied_head=tied_head, noise=0)
    backward(model, make_batch(model, [22, 10, 3]))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_a_tied_head_is_one_matrix(make_model):
    tied, free = (make_model(tied_head=tied) for tied in (True, False))
    assert tied.text_decoder.embed.weight is tied.text_decoder.head.weight
    names = [{name for name, _ in model.named_parameters()} for model in (tied, free)]
    assert len(names[1]) == len(names[0]) + 1
    extra = sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters())
    assert extra == 20 * 32


@both_tasks
def test_a_batch_without_captions_runs_both_decoders(make_model, make_batch, captioning):
    model = make_model("tiny", captioning=captioning)
    batch = make_batch(model, [None, None])
    assert model.counts(batch)["caption"] == 0
    losses, report = backward(model, batch)
    assert losses["caption"].item() == 0 and report["accuracy/caption"].item() == 0
    assert losses["pixels"].isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("text_decoder"):
            assert (parameter.grad == 0).all(), name
        else:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@both_tasks
def test_samples_without_caption_leave_the_caption_loss_of_the_others(make_model, make_batch, captioning):
    model = make_model(captioning=captioning)
    batch = make_batch(model, [6, None, 2, None])
    captioned = {name: tensor[[0, 2]] for name, tensor in batch.items()}
    found, gradients = [], []
    for each in (batch, captioned):
        model.zero_grad()
        loss = model(each)[0]["caption"]
        loss.backward()
        found.append(loss)
        gradients.append({name: parameter.grad.clone() for name, parameter in model.text_decoder.named_parameters()})
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-6, rtol=1e-4)


def test_losses_are_the_same_at_every_call(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, [6, 3])
    first, second = model(batch)[0], model(batch)[0]
    assert all(torch.equal(first[term], second[term]) for term in model.active)


def test_each_loss_reaches_the_encoder_and_its_own_decoder_alone(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, [6, 3])
    for term in model.active:
        model.zero_grad()
        model(batch)[0][term].backward()
        assert all(p.grad.abs().max() > 0 for p in model.encoder.parameters())
        other = model.text_decoder if term == "pixels" else model.pixel_decoder
        assert all(p.grad is None or (p.grad == 0).all() for p in other.parameters())


def test_a_loss_that_is_left_out_costs_nothing_and_changes_nothing(make_model, make_batch):
    whole = make_model()
    batch = make_batch(whole, [6, 3])
    for term, other in (("pixels", "text_decoder"), ("caption", "pixel_decoder")):
        alone = MUG(whole.config, dataclasses.replace(whole.context, losses=(term,)))
        state = whole.state_dict()
        alone.load_state_dict({name: value for name, value in state.items() if not name.startswith(other)})
        whole.zero_grad()
        expected = whole(batch)[0][term]
        expected.backward()
        losses, _ = alone(batch)
        losses[term].backward()
        assert list(losses) == [term] and torch.equal(losses[term], expected)
        assert alone.counts(batch) == {term: whole.counts(batch)[term]}
        gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
        for name, mine in alone.named_parameters():
            assert torch.equal(mine.grad, gradients[name]), name
        assert not hasattr(alone, other)
