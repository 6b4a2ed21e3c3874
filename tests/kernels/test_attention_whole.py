"""Attention on q, k, v (or k, v) as a projection makes them, in one tensor: the same, with one gradient."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mug.kernels import attention_op as op
from mug.kernels.attention import attention, attention_kv, attention_qkv

HAS_GPU = torch.cuda.is_available()
POISON = 777.0


def starts(device, *lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def cases(device) -> dict[str, tuple]:
    """(function on wholes, on parts, the wholes with the number of parts in each)."""
    cu_q, cu_k = starts(device, 3, 17, 1), starts(device, 5, 5, 5)
    own = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_q, "max_seqlen_q": 17, "max_seqlen_k": 17, "causal": True}
    across = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 17, "max_seqlen_k": 5}
    padded = {"kv_lengths": torch.tensor([9, 1, 4], device=device)}
    short = {"causal": True, "cu_seqlens": cu_q, "max_seqlen": 17}

    def draw(*shape) -> Tensor:
        return torch.randn(*shape, device=device)

    return {
        "qkv": (attention_qkv, {}, attention, {}, [draw(1, 18, 3, 2, 24)]),
        "qkv padded": (attention_qkv, padded, attention, padded, [draw(3, 9, 3, 2, 16)]),
        "qkv packed": (attention_qkv, short, attention, own, [draw(21, 3, 1, 16)]),
        "kv": (attention_kv, {}, attention, {}, [draw(1, 5, 2, 16), draw(1, 18, 2, 2, 16)]),
        "kv packed": (attention_kv, across, attention, across, [draw(21, 1, 16), draw(15, 2, 1, 16)]),
    }


CASES = list(cases("cpu"))


def both(case, device, backend, dtype=None) -> list[list[Tensor]]:
    """[output, gradients by the wholes], of the function on wholes and of attention on parts."""
    whole, options, parts, own_options, inputs = cases(device)[case]
    dout, results = None, []
    for function, named, split in ((whole, options, False), (parts, own_options, True)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*(op.apart(leaves) if split else leaves), backend=backend, **named)
        dout = torch.randn_like(out) if dout is None else dout
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    return results


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_wholes_equal_their_parts(case, backend):
    for whole, parts in zip(*both(case, "cpu", backend, torch.float32), strict=True):
        assert torch.equal(whole, parts)


@pytest.fixture(params=["small", "tiled"])
def kernel(request, monkeypatch) -> str:
    monkeypatch.setattr(op, "is_small", lambda *_: request.param == "small")
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_wholes_equal_their_parts_on_our_kernels(device, fresh_seed, kernel, case):
    dtype = torch.float16 if kernel == "small" else torch.float32
    for whole, parts in zip(*both(case, device, "triton", dtype), strict=True):
        assert torch.equal(whole, parts)


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("case", ["qkv", "kv packed"])
def test_backward_is_one_operator(device, case):
    whole, options, _, _, inputs = cases(device)[case]
    leaves = [x.requires_grad_() for x in inputs]
    out = whole(*leaves, backend="triton", **options)
    dout = torch.ones_like(out)
    with Operators() as operators:
        torch.autograd.grad(out, leaves, dout)
    assert [name for name in operators.names if name != "detach"] == ["attention_backward"]


@pytest.mark.parametrize("case", ["qkv", "kv packed"])
def test_every_element_of_the_gradient_is_written(device, fresh_seed, kernel, case, monkeypatch):
    buffers = []

    def guarded(shape, **_) -> Tensor:
        buffers.append(torch.full((torch.Size(shape).numel() + 8192,), POISON, device=device))
        return buffers[-1][4096:-4096].view(shape)

    whole, options, _, _, inputs = cases(device)[case]
    leaves = [x.requires_grad_() for x in inputs]
    out = whole(*leaves, backend="triton", **options)
    monkeypatch.setattr(torch, "empty", guarded)
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
    monkeypatch.undo()
    assert len(buffers) == len(inputs) == len(gradients)
    for buffer, gradient in zip(buffers, gradients, strict=True):
        assert (gradient != POISON).all() and gradient.isfinite().all()
        assert (buffer[:4096] == POISON).all() and (buffer[-4096:] == POISON).all()


@pytest.mark.parametrize("case", ["qkv", "kv packed"])
def test_torch_compile_sees_one_graph(device, fresh_seed, case):
    torch._dynamo.reset()
    whole, options, _, _, inputs = cases(device)[case]
    leaves = [x.requires_grad_() for x in inputs]

    def layer(*leaves: Tensor) -> Tensor:
        return whole(*[x * 1.0 for x in leaves], backend="triton", **options) * 1.0

    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results)


def test_the_operators_are_registered_as_torch_library_wants_them(device, fresh_seed):
    qkv = torch.randn(2, 9, 3, 2, 16, device=device, requires_grad=True)
    torch.library.opcheck(op.triton_attention, ([qkv], None, None, None, 9, 9, True, 0.25))
    q, kv = qkv.detach()[:, :, 0].contiguous(), qkv.detach()[:, :, 1:].contiguous()
    out, lse = op.triton_attention([q, kv], None, None, None, 9, 9, False, 0.25)
    masks = (None, None, None, 9, 9, False, 0.25)
    torch.library.opcheck(op.triton_attention_backward, (out, [q, kv], out.clone(), lse, *masks))


@pytest.mark.parametrize(
    "function, shapes, message",
    [
        (attention_qkv, [(5, 3, 4, 8)], r"q and k must be \[B, N, H, D\], got \(5, 4, 8\)"),
        (attention_qkv, [(2, 5, 2, 4, 8)], r"qkv has shape \(2, 5, 2, 4, 8\), expected \[\.\.\., 3, H, D\]"),
        (
            attention_kv,
            [(2, 5, 4, 8), (2, 5, 3, 4, 8)],
            r"kv has shape \(2, 5, 3, 4, 8\), expected \[\.\.\., 2, H, D\]",
        ),
        (attention_kv, [(2, 5, 4, 8), (2, 5, 2, 4, 16)], "must agree in B, H, D"),
    ],
)
def test_shapes_that_cannot_be_taken_apart_are_shown(function, shapes, message):
    with pytest.raises(ValueError, match=message):
        function(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_the_current_one():
    qkv = torch.randn(2, 50, 3, 4, 64, device="cuda:1", dtype=torch.bfloat16, requires_grad=True)
    with torch.cuda.device(0):
        out = attention_qkv(qkv, backend="triton")
        (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert out.device == gradient.device == qkv.device
    expected = attention(*qkv.float().unbind(2), backend="reference")
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=0)
