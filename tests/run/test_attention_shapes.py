"""The benchmark times every call of attention that the presets make, traced from the models themselves."""

from collections.abc import Iterator

import pytest
import torch
import torch.fx.experimental._config as symbolic
from torch._subclasses.fake_tensor import FakeTensorMode

from mug.kernels import attention, attention_backends
from mug.model import captioning, text_decoder
from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Context
from mug.model.presets import PRESETS, resolve
from mug.run.benchmarks.attention_shapes import Call, preset_calls, training_calls, whole_image_call
from mug.run.benchmarks.kernel_ops import SIZES
from mug.run.benchmarks.synthetic import VOCABULARY, synthetic_batch


@pytest.fixture
def calls(monkeypatch) -> Iterator[set[Call]]:
    """Of attention, while the models run on tensors without data."""
    calls = set()

    def note(parts, causal, starts, longest, *_):
        q, k, _ = attention.apart(parts)
        assert q.requires_grad and q.shape[-2:] == k.shape[-2:]
        queries, keys = longest if starts[0] is not None else (q.shape[1], k.shape[1])
        calls.add(Call(queries, keys, *q.shape[-2:], causal, packed=starts[0] is not None))
        return q

    monkeypatch.setattr(attention, "_attend", note)
    head = lambda hidden, *_, **__: (hidden.sum(), hidden.sum())  # noqa: E731
    monkeypatch.setattr(text_decoder, "linear_cross_entropy", head)
    with symbolic.patch(meta_nonzero_assume_all_nonzero=True):  # captions that fill the text
        yield calls


@pytest.mark.parametrize("preset", PRESETS)
def test_the_calls_of_a_preset_are_those_that_are_timed(calls, preset):
    config = resolve(MUGConfig(preset))
    with torch.device("meta"):
        model = MUG(config, Context(vocabulary=VOCABULARY))
    batch = {name: x.to("meta") for name, x in synthetic_batch(config, VOCABULARY, 2).items()}
    traced = set()
    for kind in captioning.FUNCTIONS:
        model.captioning = captioning.FUNCTIONS[kind]
        losses, _ = model(batch)
        sum(losses.values()).backward()
        assert calls == set(training_calls(resolve(MUGConfig(preset, captioning=kind))))
        traced |= calls
        calls.clear()
    model.encoder(batch["image"])
    assert calls == {whole_image_call(config)}
    timed = {call for _, call in SIZES["cuda"].attention}
    assert traced | calls <= set(preset_calls()) <= timed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_no_packed_call_of_a_preset_is_padded_on_a_gpu(monkeypatch, dtype):
    """For want of any measurement; the choice is made of facts that a CPU can state."""
    pytest.importorskip("triton")
    monkeypatch.setattr(attention, "TABLE", {})
    for module in (attention, attention_backends):
        monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
    attention._look_up.cache_clear()
    with FakeTensorMode():
        starts = torch.empty(9, dtype=torch.int32, device="cuda")
        for call in preset_calls():
            q = torch.empty(99, call.heads, call.head_dim, dtype=dtype, device="cuda", requires_grad=True)
            masks = attention.Masks(call.causal, starts, starts, call.queries, call.keys, None, 0.1)
            assert not call.packed or attention._choose("auto", q, q, q, masks) in ("sdpa_flash", "triton")
    attention._look_up.cache_clear()
