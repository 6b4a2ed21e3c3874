"""MUG trained on the fused kernel and on the reference."""

import pytest
import torch

from mug.kernels import masked_patch_loss


def train(make_model, make_batch, steps: int) -> list[float]:
    model = make_model(image_size=16, width=16, text_width=16, pixel_width=16, noise=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for step in range(steps):
        losses, _ = model(make_batch(model, [3, 2], seed=step))
        optimizer.zero_grad()
        (losses["pixels"] + 0.1 * losses["caption"]).backward()
        optimizer.step()
        history.append(losses["pixels"].item())
    return history


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU Triton does not take CPU tensors")
def test_fifty_steps_on_the_kernel_give_the_losses_of_the_reference(make_model, make_batch, monkeypatch):
    pytest.importorskip("triton")
    reference = train(make_model, make_batch, 50)
    monkeypatch.setattr(masked_patch_loss, "DEFAULT_BACKEND", "triton")
    assert train(make_model, make_batch, 50) == pytest.approx(reference, rel=1e-4)
    assert reference[-1] != reference[0]
