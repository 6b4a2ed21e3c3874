"""What backward computes again: the same gradients to the bit, out of less that is kept."""

import pytest
import torch

from mug.model.activation_checkpointing import POLICIES, activation_checkpointing


def kept_bytes(model, batch) -> tuple[int, torch.Tensor]:
    """Of the tensors that backward finds, without the weights; and the loss."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sum(model(batch)[0].values())
    return sum(storage.nbytes() for address, storage in storages.items() if address not in weights), loss


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("captioning", ["autoregressive", "masked-language"])
def test_losses_and_gradients_are_the_same_to_the_bit(make_model, make_batch, policy, captioning):
    model = make_model(captioning=captioning)
    batch = make_batch(model, [3, 5, None])
    results = []
    for chosen in ("none", policy):
        activation_checkpointing(model, chosen)
        losses, report = model(batch)
        results.append((losses, report, torch.autograd.grad(sum(losses.values()), list(model.parameters()))))
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)


@pytest.mark.parametrize("module", ["encoder", "pixel_decoder", "text_decoder"])
def test_norms_and_activations_are_not_kept(make_model, make_batch, module):
    """Of a block of width D and T tokens: two layer norms' outputs and a GELU's, D + D + 4 D values a token; a third
    norm's where it looks at the image."""
    model = make_model()
    batch = make_batch(model, [3, 5, None])
    before, _ = kept_bytes(model, batch)
    activation_checkpointing(getattr(model, module), "elementwise")
    after, loss = kept_bytes(model, batch)
    B, config = 3, model.config
    values = {
        "encoder": B * (1 + config.visible) * config.depth * 6 * config.width,
        "pixel_decoder": B * (1 + config.patches) * config.pixel_depth * 6 * config.pixel_width,
        "text_decoder": (5 + 7 + 1)  # BOS and EOS count
        * (6 * config.text_unimodal_layers + 7 * config.text_cross_layers)
        * config.text_width,
    }
    assert before - after == 4 * values[module]
    loss.backward()
