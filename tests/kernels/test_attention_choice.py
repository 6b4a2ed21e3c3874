"""Which backend serves a call of attention, what each refuses, the table behind "auto", and packed calls on a CPU."""

import itertools
import json
import logging

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mug.kernels import attention as module
from mug.kernels import attention_backends, attention_table
from mug.kernels.attention import attention
from mug.kernels.attention_table import Key, bucket, fastest, read_table, write_table


def packed_example(q_lengths, k_lengths, H=2, D=8):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(n), H, D, generator=generator) for n in (q_lengths, k_lengths, k_lengths))
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in (q_lengths, k_lengths)]
    return [q, k, v], {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}


@pytest.mark.parametrize("backend", ["auto", "sdpa", "sdpa_flash", "sdpa_math", "reference"])
@pytest.mark.parametrize(
    "q_lengths, k_lengths, causal, kv_lengths",
    [
        ([3, 1, 6], [3, 1, 6], False, None),
        ([3, 1, 6], [3, 1, 6], True, None),
        ([4, 2, 1], [5, 5, 5], False, None),
        ([2, 0, 3], [4, 1, 0], False, None),
        ([3, 4], [3, 4], True, [2, 9]),
    ],
)
def test_packed_sequences_equal_each_alone(backend, q_lengths, k_lengths, causal, kv_lengths):
    tensors, starts = packed_example(q_lengths, k_lengths)
    lengths = None if kv_lengths is None else torch.tensor(kv_lengths)
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = attention(*leaves, causal=causal, kv_lengths=lengths, backend=backend, **starts)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    alone = [x.clone().requires_grad_() for x in tensors]
    parts = [x.split(n) for x, n in zip(alone, (q_lengths, k_lengths, k_lengths), strict=True)]
    expected = [torch.zeros_like(q)[None] + 0 * q for q in parts[0]]
    for b, (q, k, v) in enumerate(zip(*parts, strict=True)):
        n = len(k) if kv_lengths is None else min(len(k), kv_lengths[b])
        if n and len(q):
            scores = torch.einsum("qhd,khd->hqk", q, k[:n]) * q.shape[-1] ** -0.5
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
            expected[b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[:n])[None]
    expected = torch.cat([x[0] for x in expected])
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    gradients = torch.autograd.grad((out * weight).sum(), leaves)
    truths = torch.autograd.grad((expected * weight).sum(), alone)
    torch.testing.assert_close(gradients, truths, atol=1e-5, rtol=1e-5)


def dense(dtype=torch.float32):
    return [torch.randn(1, 4, 1, 8).to(dtype) for _ in range(3)]


@pytest.mark.parametrize(
    "backend, message",
    [
        ("sdpa_cudnn", "q is on cpu"),
        ("sdpa_efficient", "q is on cpu"),
        ("flash_attn", "flash-attn is not installed|q is on cpu"),
        ("flash_attn_4", "flash-attn-4 is not installed|q is on cpu"),
    ],
)
def test_a_backend_asked_for_by_name_that_cannot_serve_says_why(backend, message):
    with pytest.raises(ValueError, match=rf'backend="{backend}" cannot serve this call: ({message})'):
        attention(*dense(), backend=backend)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(1, 4, 1, 256), "k": torch.zeros(1, 4, 1, 256)}, "q has head dimension 256; max is 128"),
        ({"q": torch.zeros(1, 4, 1, 8, dtype=torch.float64)}, "q is torch.float64, k torch.float32"),
        ({"k": torch.zeros(1, 0, 1, 8)}, "k is empty"),
        ({"kv_lengths": torch.tensor([1.0])}, "kv_lengths is torch.float32, not int32 or int64"),
        ({"kv_lengths": torch.zeros(1, dtype=torch.int64, device="meta")}, "kv_lengths and q are on different devices"),
    ],
    ids=["width", "dtypes", "empty", "lengths", "device"],
)
def test_what_the_triton_kernels_do_not_serve_is_named(device, change, message):
    q = change.pop("q", torch.zeros(1, 4, 1, 8))
    k = change.pop("k", torch.zeros(1, 4, 1, 8))
    tensors = [x.to(device) for x in (q, k, k)]
    with pytest.raises(ValueError, match=f'backend="triton" cannot serve this call: {message}'):
        attention(*tensors, **change, backend="triton")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cu_seqlens_k": None}, "come together or not at all"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 7])}, r"cu_seqlens_q is torch.int64, .* must be torch.int32"),
        ({"cu_seqlens_q": torch.tensor([0, 7]).int()}, r"must both be \[B \+ 1\], got \(2,\), \(3,\)"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 6]).int()}, r"cu_seqlens_q must rise from 0 to 7, got \[0, 3, 6\]"),
        ({"cu_seqlens_k": torch.tensor([0, 8, 7]).int()}, r"cu_seqlens_k must rise from 0 to 7, got \[0, 8, 7\]"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 7]).int(), "causal": True}, "cu_seqlens_q and cu_seqlens_k differ"),
        ({"kv_lengths": torch.tensor([1, 2, 3])}, r"kv_lengths has shape \(3,\), expected \(2,\)"),
    ],
    ids=["one", "dtype", "number", "end", "order", "causal", "lengths"],
)
def test_starts_of_sequences_that_are_wrong_are_named(change, message):
    tensors, starts = packed_example([3, 4], [3, 4])
    with pytest.raises(ValueError, match=message):
        attention(*tensors, **{**starts, **change})


def test_packed_sequences_have_three_dimensions():
    _, starts = packed_example([2, 2], [2, 2])
    with pytest.raises(ValueError, match=r"must be \[T, H, D\], as cu_seqlens are given, got \(1, 4, 1, 8\)"):
        attention(*dense(), **starts)


def test_auto_on_a_cpu_is_pytorchs_sdpa_and_nothing_else(monkeypatch):
    q, k, v = dense()
    expected = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    seen = []

    class Operators(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(function.overloadpacket.__name__)
            return function(*arguments, **(options or {}))

    with Operators():
        out = attention(q, k, v)
    assert torch.equal(out, expected)
    assert [name for name in seen if name != "transpose"] == ["_scaled_dot_product_flash_attention_for_cpu"]


def test_the_environment_overrides_auto_and_nothing_else(monkeypatch):
    calls = []
    monkeypatch.setitem(module.RUN, "reference", lambda parts, _: calls.append(parts) or parts[0])
    monkeypatch.setattr(module, "DEFAULT_BACKEND", "reference")
    q, k, v = dense()
    attention(q, k, v)
    attention(q, k, v, backend="sdpa")
    assert len(calls) == 1
    monkeypatch.setattr(module, "DEFAULT_BACKEND", "fastest")
    with pytest.raises(ValueError, match="backend='fastest' is not one of auto, triton"):
        attention(q, k, v)


def fake(device, *shape, dtype=torch.bfloat16):
    """A tensor without data on a device that need not be there."""
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device=device, requires_grad=dtype.is_floating_point)


def choose(q, queries=64, keys=64, packed=True, causal=False, kv_lengths=None):
    starts = fake(q.device, 9, dtype=torch.int32) if packed else None
    masks = module.Masks(causal, starts, starts, queries, keys, kv_lengths, 1.0)
    return module._choose("auto", q, q, q, masks)


@pytest.fixture
def table(monkeypatch) -> dict[Key, str]:
    """An empty table, on a machine whose GPU is an H100."""
    table = {}
    monkeypatch.setattr(module, "TABLE", table)
    for place in (module, attention_backends):
        monkeypatch.setattr(place, "architecture", lambda device: "sm_90")
    module._look_up.cache_clear(), module._log_once.cache_clear()
    yield table
    module._look_up.cache_clear(), module._log_once.cache_clear()


def test_auto_on_a_gpu_reads_the_table_and_logs_each_kind_once(table, caplog):
    table[Key("sm_90", True, 64, 64, 64, False, False)] = "triton"
    table[Key("sm_90", True, 64, 64, 128, False, True)] = "flash_attn"  # which is not installed
    caplog.set_level(logging.INFO)
    q_BNHD, q_THD = fake("cuda:0", 2, 64, 3, 64), fake("cuda:0", 99, 3, 64)
    assert choose(q_BNHD, packed=False) == choose(q_BNHD, 50, 50, packed=False) == "triton"
    assert choose(q_BNHD, packed=False, causal=True) == "sdpa"
    assert choose(q_THD, keys=65) == "sdpa_flash"
    first, second, third = (record.message for record in caplog.records)
    kind = "training, half precision, D=64, N up to 64, keys up to 64"
    assert first == f"attention on cuda:0 ({kind}, causal=False, varlen=False): triton, as measured"
    assert second == f"attention on cuda:0 ({kind}, causal=True, varlen=False): sdpa, not measured"
    assert third.endswith("keys up to 128, causal=False, varlen=True): sdpa_flash, not measured")


@pytest.mark.parametrize(
    "dtype, D, lengths, expected",
    [
        (torch.bfloat16, 64, False, "sdpa_flash"),
        (torch.float16, 80, False, "sdpa_flash"),
        (torch.float16, 256, False, "sdpa_flash"),
        (torch.bfloat16, 20, False, "triton"),  # varlen_attn wants a multiple of 8
        (torch.bfloat16, 64, True, "triton"),  # and knows no padding
        (torch.float32, 64, False, "triton"),
        (torch.float32, 256, False, "sdpa"),
        (torch.float64, 64, False, "sdpa"),
    ],
)
def test_packed_on_a_gpu_without_a_measurement(table, dtype, D, lengths, expected):
    pytest.importorskip("triton")
    q_THD = fake("cuda:0", 100, 3, D, dtype=dtype)
    kv_lengths = fake("cuda:0", 8, dtype=torch.int32) if lengths else None
    assert choose(q_THD, kv_lengths=kv_lengths) == expected
    assert choose(fake("cuda:0", 8, 64, 3, D, dtype=dtype), packed=False) == "sdpa"
    assert choose(fake("cpu", 100, 3, D, dtype=dtype)) in ("sdpa", "sdpa_flash")


def test_packed_on_a_gpu_before_ampere(table, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(attention_backends, "architecture", lambda device: "sm_75")
    assert choose(fake("cuda:0", 100, 3, 64, dtype=torch.float16)) == "triton"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("whole", [False, True])
def test_no_packed_call_on_a_gpu_is_padded(table, monkeypatch, dtype, whole):
    pytest.importorskip("triton")
    monkeypatch.setattr(attention_backends, "_padded", None)
    with FakeTensorMode():
        qkv = torch.empty(100, 3, 12, 64, dtype=dtype, device="cuda", requires_grad=True)
        q, starts = qkv[:, 0], torch.empty(5, dtype=torch.int32, device="cuda")
        options = {"causal": True, "cu_seqlens": starts, "max_seqlen": 64}
        cross = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 64, "max_seqlen_k": 65}
        if whole:
            outs = [module.attention_qkv(qkv, **options), module.attention_kv(q, qkv[:, 1:], **cross)]
        else:
            outs = [attention(*qkv.unbind(1), **cross)]
    assert all(out.shape == q.shape and out.dtype == dtype and out.requires_grad for out in outs)


def test_buckets_hold_what_fits():
    assert [bucket(n) for n in (1, 16, 17, 50, 64, 65, 197, 257, 577, 1280, 1281)] == [
        16, 16, 32, 64, 64, 128, 256, 320, 640, 1280, 0,
    ]  # fmt: skip


def timing(backend, milliseconds, shape="a", name="both", **changes):
    kind = {"architecture": "sm_90", "head_dim": 64, "queries": 50, "keys": 50, "causal": False, "varlen": False}
    return {"backend": backend, "pass": name, "milliseconds": milliseconds, "shape": shape, **kind, **changes}


def test_the_fastest_over_all_shapes_of_a_key_is_chosen():
    key = Key("sm_90", True, 64, 64, 64, False, False)
    rows = [timing("triton", 1.0), timing("triton", 4.0, "b"), timing("sdpa", 1.5), timing("sdpa", 2.0, "b")]
    assert fastest(rows) == {key: "sdpa"}  # geometric means 2 and 1.73
    rows += [timing("flash_attn", 0.1), timing("triton", 0.1, name="backward"), timing("triton", 0.1, keys=2000)]
    assert fastest(rows) == {key: "sdpa"}  # flash_attn did not serve b
    rows += [timing("triton", 1.0, name="forward"), timing("triton", 9.0, "b", "forward")]
    assert fastest(rows)[key._replace(training=False)] == "triton"


def test_the_table_keeps_what_was_not_measured_again(tmp_path):
    path = tmp_path / "table.json"
    path.write_text('{"measured": {}, "entries": []}')
    write_table([timing("triton", 1.0, architecture="sm_80")], {"device": "A100"}, path)
    write_table([timing("triton", 1.0)], {"device": "H100"}, path)
    write_table([timing("triton", 9.0), timing("sdpa", 1.0)], {"device": "H100"}, path)
    write_table([timing("sdpa_flash", 1.0, head_dim=32)], {"device": "H200"}, path)
    keys = [Key("sm_80", True, 64, 64, 64, False, False), Key("sm_90", True, 32, 64, 64, False, False)]
    keys.append(keys[1]._replace(head_dim=64))
    assert read_table(path) == dict(zip(keys, ["triton", "sdpa_flash", "sdpa"], strict=True))
    assert json.loads(path.read_text())["measured"] == {"sm_80": {"device": "A100"}, "sm_90": {"device": "H200"}}
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


def test_the_table_that_ships_names_backends_and_where_they_were_measured():
    table = json.loads(attention_table.PATH.read_text())
    assert {key.architecture for key in attention_table.TABLE} <= table["measured"].keys()
    assert set(attention_table.TABLE.values()) <= set(module.BACKENDS) - {"auto"}
    assert all({key.queries, key.keys} <= {*attention_table.BUCKETS} for key in attention_table.TABLE)
    assert len(table["entries"]) == len(attention_table.TABLE)
    assert all(a < b for a, b in itertools.pairwise(attention_table.BUCKETS))
