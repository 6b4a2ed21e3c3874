"""Each block under torch.compile is one graph, packed captions included, and computes the same."""

import pytest
import torch
from torch._dynamo.utils import counters

from mug.kernels import attention, attention_backends
from mug.model import compiled
from mug.model.activation_checkpointing import activation_checkpointing
from mug.model.compiled import compile_blocks
from mug.model.objectives.classify import Classify, ClassifyConfig
from mug.model.objectives.objective import Context
from mug.model.presets import resolve


@pytest.fixture(autouse=True)
def not_lowered(monkeypatch):
    """Traced and differentiated as in training, but run by PyTorch's own kernels: inductor takes a minute."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()


def losses_and_gradients(model, batches):
    losses = [sum(model(batch)[0].values()) for batch in batches]
    return losses, torch.autograd.grad(sum(losses), list(model.parameters()))


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_blocks_are_one_graph_each(make_model, make_batch, monkeypatch, backend):
    monkeypatch.setattr(attention, "DEFAULT_BACKEND", backend)
    model = make_model()
    batches = [make_batch(model, [3, 5, None]), make_batch(model, [6, 1, 2], seed=1)]  # 13 and 15 tokens
    expected = losses_and_gradients(model, batches)
    compile_blocks(model)
    torch.testing.assert_close(losses_and_gradients(model, batches), expected, atol=1e-6, rtol=1e-5)
    assert not counters["graph_break"]


@pytest.mark.parametrize("policy", ["none", "blocks"])
def test_captions_of_any_length_share_one_graph_a_kind_of_block(make_model, make_batch, policy):
    model = make_model(depth=3, text_unimodal_layers=2, text_cross_layers=2)
    activation_checkpointing(model, policy)
    compile_blocks(model)
    for seed in range(50 if policy == "none" else 5):
        words = torch.randint(-1, 7, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
        losses, _ = model(make_batch(model, [None if count < 0 else count for count in words], seed))
        sum(losses.values()).backward()
    # Of the encoder, of the pixel decoder, without and with cross-attention.
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]


def test_an_evaluation_compiles_nothing(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, [3, None])
    with torch.no_grad():
        expected = model(batch)
        compile_blocks(model)
        torch.testing.assert_close(model(batch), expected, atol=0, rtol=0)
    assert not counters["stats"]["unique_graphs"]


def test_stochastic_depth_of_any_rate_shares_two_graphs():
    config = resolve(ClassifyConfig(image_size=32, patch_size=8, width=32, depth=5, heads=2, drop_path=0.4))
    model = Classify(config, Context(seed=5, class_names=("a", "b", "c"))).train()
    torch.nn.init.normal_(model.head.weight)
    side = config.image_size
    batches = [
        {
            "image": torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8),
            "target": torch.eye(3)[torch.arange(4) % 3],
            "position": torch.arange(4) + 4 * step,
        }
        for step in range(4)
    ]
    expected = losses_and_gradients(model, batches)
    compile_blocks(model)
    torch.testing.assert_close(losses_and_gradients(model, batches), expected, atol=1e-6, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # the first block's rate is 0


def test_the_choice_from_the_table_is_no_break(monkeypatch):
    """As on a GPU: the table's answer is a constant of the graph."""
    key = attention.Key("sm_90", True, 8, 16, 16, False, False)
    monkeypatch.setattr(attention, "TABLE", {key: "reference"})
    monkeypatch.setattr(attention, "architecture", lambda device: "sm_90")
    on_a_gpu = torch.compiler.assume_constant_result(lambda *kind: attention._look_up("cuda:0", True, *kind[2:]))
    monkeypatch.setattr(attention, "_candidates", on_a_gpu)
    attention._look_up.cache_clear()
    masks = attention.Masks(False, None, None, 5, 5, None, 0.3)
    q = torch.randn(2, 5, 3, 8, requires_grad=True)
    choices = []

    @torch.compile(backend="eager", fullgraph=True)
    def layer(q):
        choices.append(attention._choose("auto", q, q, q, masks))
        return q + 1

    layer(q)
    attention._look_up.cache_clear()
    assert choices == ["reference"]


def test_packed_captions_on_a_gpu_are_one_graph_of_any_length(monkeypatch):
    """As on a GPU, for want of a measurement: choice and call of PyTorch's varlen attention."""
    on_a_gpu = torch.compiler.assume_constant_result(lambda *kind: attention._look_up("cuda:0", False, *kind[2:]))
    monkeypatch.setattr(attention, "_candidates", on_a_gpu)
    monkeypatch.setattr(attention_backends, "architecture", lambda device: "sm_90")
    starts = torch.empty(9, dtype=torch.int32, device="meta")
    masks = attention.Masks(True, starts, starts, 64, 64, None, 0.1)
    choices = []

    def layer(qkv):
        parts = (qkv * 1.0,)
        choices.append(attention._choose("auto", *attention.apart(parts), masks))
        return attention.RUN["sdpa_flash"](parts, masks) * 1.0

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for tokens in (99, 120, 77):
        qkv = torch.empty(tokens, 3, 12, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
        compiled(qkv).sum().backward()
        assert qkv.grad.shape == qkv.shape
    assert choices == 3 * ["sdpa_flash"]  # traced for the first length, then twice for any
