"""MUG trained on each kernel and on the references: the same losses."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mug.kernels import attention, attention_backends, masked_patch_loss
from mug.model import text_decoder

pytestmark = pytest.mark.usefixtures("mended_interpreter")
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU Triton does not take CPU tensors")


def train(make_model, make_batch, steps: int, device: str = "cpu") -> list[tuple[float, float]]:
    """(pixel loss, caption loss) of each step."""
    model = make_model(image_size=16, width=16, text_width=16, pixel_width=16, noise=0).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for step in range(steps):
        batch = {name: x.to(device) for name, x in make_batch(model, [3, 2], seed=step).items()}
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            losses, _ = model(batch)
        optimizer.zero_grad()
        (losses["pixels"] + 0.1 * losses["caption"]).backward()
        optimizer.step()
        history.append((losses["pixels"].item(), losses["caption"].item()))
    return history


def assert_same(history, expected, rtol=1e-4):
    torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), atol=0, rtol=rtol)
    assert history[-1] != history[0]


@pytest.mark.slow
@needs_interpreter
def test_fifty_steps_on_the_kernels_of_both_losses_give_the_losses_of_the_references(
    make_model, make_batch, monkeypatch
):
    expected = train(make_model, make_batch, 50)
    monkeypatch.setattr(masked_patch_loss, "DEFAULT_BACKEND", "triton")
    head = functools.partial(text_decoder.linear_cross_entropy, backend="triton")
    monkeypatch.setattr(text_decoder, "linear_cross_entropy", head)
    assert_same(train(make_model, make_batch, 50), expected)


ON_CPU = [pytest.param("triton", marks=[pytest.mark.slow, needs_interpreter]), "sdpa", "sdpa_flash", "sdpa_math"]
ON_GPU = ["triton", "sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math", "flash_attn", "flash_attn_4"]


def train_on_attention(make_model, make_batch, monkeypatch, backend, device):
    """(losses with the backend, with the reference)."""
    calls, chosen = [], attention_backends.RUN[backend]
    monkeypatch.setitem(attention.RUN, backend, lambda *inputs: calls.append(inputs) or chosen(*inputs))
    monkeypatch.setattr(attention, "DEFAULT_BACKEND", "reference")
    expected = train(make_model, make_batch, 20, device)
    assert not calls
    monkeypatch.setattr(attention, "DEFAULT_BACKEND", backend)
    history = train(make_model, make_batch, 20, device)
    assert len(calls) == 20 * 6  # encoder 2, pixel decoder 1, text decoder 2 and 1 across
    return history, expected


@pytest.mark.parametrize("backend", ON_CPU)
def test_twenty_steps_on_each_attention_give_the_losses_of_the_reference(make_model, make_batch, monkeypatch, backend):
    assert_same(*train_on_attention(make_model, make_batch, monkeypatch, backend, "cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ON_GPU)
def test_twenty_steps_on_each_attention_on_a_gpu(make_model, make_batch, monkeypatch, backend):
    if backend.startswith("flash") and not attention_backends.installed(backend):
        pytest.skip("not installed")
    assert_same(*train_on_attention(make_model, make_batch, monkeypatch, backend, "cuda"), rtol=2e-2)


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


@needs_interpreter
def test_backward_neither_stacks_gradients_nor_adds_them_row_by_row(make_model, make_batch, monkeypatch):
    monkeypatch.setattr(attention, "DEFAULT_BACKEND", "triton")
    model = make_model(image_size=16, width=32, text_width=16, pixel_width=16)
    packing = text_decoder.pack(torch.tensor([5, 4]), T=8, L=5)
    hidden_RD = model.text_decoder(torch.ones(2, 8).long(), torch.randn(2, 5, 32), packing=packing)
    with Operators() as operators:
        hidden_RD.sum().backward()
    assert {"attention_backward", "embedding_dense_backward"} <= operators.names
    assert not {name for name in operators.names if name == "stack" or "index_put" in name}
