"""Each block under torch.compile is one graph, packed captions included, and computes the same."""

import pytest
import torch

from mug.kernels import attention, attention_backends


def losses_and_gradients(model, batches):
    losses = [sum(model(batch)[0].values()) for batch in batches]
    return losses, torch.autograd.grad(sum(losses), list(model.parameters()))


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_blocks_are_one_graph_each(make_model, make_batch, monkeypatch, backend):
    monkeypatch.setattr(attention, "DEFAULT_BACKEND", backend)
    torch._dynamo.reset()
    model = make_model()
    batches = [make_batch(model, [3, 5, None]), make_batch(model, [6, 1, 2], seed=1)]  # 13 and 15 tokens
    expected = losses_and_gradients(model, batches)
    for block in (m for m in model.modules() if isinstance(m, tuple(model.zero3_leaves))):
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(losses_and_gradients(model, batches), expected, atol=1e-6, rtol=1e-5)


def test_the_choice_from_the_table_is_no_break(monkeypatch):
    """As on a GPU: the table's answer is a constant of the graph."""
    key = attention.Key("sm_90", True, 8, 16, False, False)
    monkeypatch.setattr(attention, "TABLE", {key: "reference"})
    monkeypatch.setattr(attention, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(attention, "_measured", lambda *kind: attention._look_up("cuda:0", True, *kind[2:]))
    monkeypatch.setattr(attention, "_measured", torch.compiler.assume_constant_result(attention._measured))
    attention._look_up.cache_clear()
    masks = attention.Masks(False, None, None, 5, 5, None, 0.3)
    q = torch.randn(2, 5, 3, 8, requires_grad=True)
    choices = []

    @torch.compile(backend="eager", fullgraph=True)
    def layer(q):
        choices.append(attention._choose("auto", q, q, q, masks))
        return attention_backends.reference(q, q, q, masks)

    layer(q)
    attention._look_up.cache_clear()
    assert choices == ["reference"]
