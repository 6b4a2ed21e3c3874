"""The Triton attention kernels against float64 and PyTorch's math backend: on a GPU, or else in the interpreter."""

import functools
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mug.kernels import attention_op as op
from mug.kernels.attention import attention

POISON = 777.0
HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
needs_interpreter = pytest.mark.skipif(HAS_GPU, reason="on a GPU Triton does not take CPU tensors")


def slow(*values: object) -> list:
    """Parameters that the fast tests leave out: in Triton's interpreter each costs about a second."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)]


@dataclass
class Case:
    """q, k, v and the gradient of the output, dense or packed, with the options of the call."""

    tensors: list[Tensor]
    dout: Tensor
    options: dict = field(default_factory=dict)

    def run(self, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """[out, dq, dk, dv]."""
        return run(functools.partial(attention, backend=backend, **self.options), self.tensors, self.dout, dtype)

    def exact(self) -> list[Tensor]:
        return run(functools.partial(plain, **self.options), self.tensors, self.dout, torch.float64)


def run(function, tensors: list[Tensor], dout: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = function(*[x.view_as(x) for x in leaves])
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def plain(q, k, v, causal=False, cu_seqlens_q=None, cu_seqlens_k=None, kv_lengths=None, scale=None, **_) -> Tensor:
    """Softmax over the keys that are no padding, one sequence at a time."""
    if cu_seqlens_q is not None:
        q, k, v = (x.split(c.diff().tolist()) for x, c in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k)))
    outs = []
    for b, (q_b, k_b, v_b) in enumerate(zip(q, k, v, strict=True)):
        keys = len(k_b) if kv_lengths is None else min(int(kv_lengths[b]), len(k_b))
        scores = torch.einsum("qhd,khd->hqk", q_b, k_b[:keys]) * (q_b.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_b[:keys]))
    return torch.stack(outs) if cu_seqlens_q is None else torch.cat(outs)


def make(device, B=2, Nq=17, Nk=None, H=3, D=16, dtype=torch.float32, **options) -> Case:
    """Self-attention comes as views into one tensor, as it does of the model; cross-attention as q and views."""
    if Nk is None:
        tensors = list(torch.randn(B, Nq, 3, H, D, device=device).to(dtype).unbind(2))
    else:
        q, kv = torch.randn(B, Nq, H, D, device=device), torch.randn(B, Nk, 2, H, D, device=device)
        tensors = [q.to(dtype), *kv.to(dtype).unbind(2)]
    if "kv_lengths" in options:
        options["kv_lengths"] = torch.tensor(options["kv_lengths"], device=device)
    return Case(tensors, torch.randn(B, Nq, H, D, device=device).to(dtype), options)


def make_packed(device, q_lengths, k_lengths=None, H=3, D=16, dtype=torch.float32, **options) -> Case:
    k_lengths = k_lengths or q_lengths
    starts = [torch.tensor([0, *n], device=device).cumsum(0).int() for n in (q_lengths, k_lengths)]
    totals = [sum(q_lengths), sum(k_lengths), sum(k_lengths), sum(q_lengths)]
    *tensors, dout = (torch.randn(n, H, D, device=device).to(dtype) for n in totals)
    options |= {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "max_seqlen_q": max(q_lengths)}
    options |= {"max_seqlen_k": max(k_lengths)}
    if "kv_lengths" in options:
        options["kv_lengths"] = torch.tensor(options["kv_lengths"], device=device)
    return Case(tensors, dout, options)


def largest_score_gradient(case: Case) -> Tensor:
    """Returns a bound on what one dP = dout·v contributes to an element of dq or dk, before the softmax's subtraction.

    For a query with one dominant key, dP and what is subtracted nearly cancel. PyTorch subtracts a sum of the same dP,
    whose rounding cancels too; FlashAttention-2 subtracts rowsum(dout ∘ out), whose rounding is another. So the
    rounding of dP stays in dq and dk, and for about 1% of random data at scale 0.7 is several times PyTorch's error.
    """
    q, k, v, dout = (x.double() for x in (*case.tensors, case.dout))
    scale = case.options.get("scale", q.shape[-1] ** -0.5)
    return scale * dout.norm(dim=-1).max() * v.norm(dim=-1).max() * max(q.abs().max(), k.abs().max())


def assert_as_near_as_pytorch(case: Case) -> None:
    """At most twice the error of PyTorch's math backend, which computes half precision in fp32 and rounds at the end.

    So the root mean square; the largest error of a few hundred may lie farther out, by the rounding of one
    probability to half precision that tensor cores ask for.
    """
    names, exact = ("out", "dq", "dk", "dv"), case.exact()
    largest = max(x.abs().max() for x in exact)  # of what a gradient of 0, as over a single key, is the difference
    # A GPU's exp2 is good to 2 units in the last place; dP is a sum, rounded more than once.
    fp32 = 2**-22 * largest + 2**-23 * largest_score_gradient(case)
    half = torch.finfo(case.dout.dtype).eps * largest
    for name, ours, pytorchs, truth in zip(names, case.run("triton"), case.run("sdpa_math"), exact, strict=True):
        assert ours.dtype == case.dout.dtype and ours.shape == truth.shape
        ours, pytorchs = ((x.double() - truth).abs() for x in (ours, pytorchs))
        assert ours.max() <= 2 * pytorchs.max() + fp32 + half, f"{name}: {ours.max():.2e}, {pytorchs.max():.2e}"
        ours, pytorchs = (x.square().mean().sqrt() for x in (ours, pytorchs))
        assert ours <= 2 * pytorchs + fp32, f"{name}: rms {ours:.2e}, PyTorch {pytorchs:.2e}"


@pytest.fixture(params=["small", "tiled"])
def kernel(request, monkeypatch) -> str:
    """The kernel that serves, whatever the sizes and dtype."""
    monkeypatch.setattr(op, "is_small", lambda *_: request.param == "small")
    return request.param


SERVED = {
    "small fp32": ("small", torch.float32),  # never chosen, but the sharpest look at what it computes
    "small fp16": ("small", torch.float16),
    "small bf16": ("small", torch.bfloat16),
    "tiled fp32": ("tiled", torch.float32),
}


@pytest.fixture(params=[pytest.param(name, marks=[needs_gpu] * name.endswith("bf16")) for name in SERVED])
def dtype(request, monkeypatch) -> torch.dtype:
    """Of the tensors, with the kernel that is to serve: not the tiled one in half precision, which serves long ones."""
    kernel, dtype = SERVED[request.param]
    monkeypatch.setattr(op, "is_small", lambda *_: kernel == "small")
    return dtype


@pytest.mark.parametrize("D", [8, 80, *slow(16, 32, 64, 72, 88, 96, 128)])
def test_head_dimensions(device, fresh_seed, dtype, D):
    assert_as_near_as_pytorch(make(device, B=1, Nq=19, H=2, D=D, dtype=dtype))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("N", [1, 33, *slow(16, 64)])
def test_lengths(device, fresh_seed, dtype, N, causal):
    assert_as_near_as_pytorch(make(device, B=1, Nq=N, H=1, D=32, dtype=dtype, causal=causal))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_more_than_one_tile(device, fresh_seed, monkeypatch, dtype):
    monkeypatch.setattr(op, "is_small", lambda *_: False)
    for causal in (False, True):
        assert_as_near_as_pytorch(make(device, B=1, Nq=70, H=2, D=16, dtype=dtype, causal=causal))
        assert_as_near_as_pytorch(make(device, B=2, Nq=66, H=1, dtype=dtype, causal=causal, kv_lengths=[65, 30]))
        assert_as_near_as_pytorch(make_packed(device, [70, 3, 130], H=1, dtype=dtype, causal=causal))
    assert_as_near_as_pytorch(make(device, B=1, Nq=20, Nk=130, H=1, D=16, dtype=dtype))
    assert_as_near_as_pytorch(make(device, B=1, Nq=130, Nk=20, H=1, D=88, dtype=dtype))


def test_which_kernel_serves():
    half, full = torch.bfloat16, torch.float32
    assert op.is_small(half, 128, 128, packed=False) and op.is_small(half, 64, 128, packed=True)
    assert not op.is_small(half, 129, 1, packed=False) and not op.is_small(half, 1, 129, packed=False)
    assert not op.is_small(half, 65, 65, packed=True) and not op.is_small(full, 16, 16, packed=False)
    assert op.small_blocks(65, 65) == {"BLOCK_Q": 128, "BLOCK_K": 128, "num_warps": 8}


def test_a_head_of_more_than_64_tokens_in_one_program(device, fresh_seed):
    assert_as_near_as_pytorch(make(device, B=1, Nq=65, H=2, D=80, dtype=torch.float16))
    assert_as_near_as_pytorch(make(device, B=2, Nq=128, H=1, dtype=torch.float16, causal=True, kv_lengths=[128, 70]))
    assert_as_near_as_pytorch(make_packed(device, [64, 3], [65, 65], H=1, dtype=torch.float16))


@pytest.mark.parametrize("case", [
    {"B": 3, "Nq": 9, "causal": True, "kv_lengths": [9, 4, 0]}, {"B": 3, "Nq": 5, "Nk": 18, "kv_lengths": [17, 30, 1]},
    *slow(
        {"B": 3, "Nq": 1, "H": 5}, {"B": 5, "Nq": 3, "Nk": 20, "H": 1}, {"Nq": 20, "Nk": 3}, {"scale": 0.7},
        {"scale": 0.0}, {"B": 4, "Nq": 9, "kv_lengths": [9, 4, 1, 0]},
    ),
], ids=str)  # fmt: skip
def test_masks_and_shapes(device, fresh_seed, dtype, case):
    assert_as_near_as_pytorch(make(device, dtype=dtype, **case))


@pytest.mark.parametrize("case", [
    {"q_lengths": [4, 0, 9], "causal": True}, {"q_lengths": [5, 0, 6, 2], "k_lengths": [2, 3, 0, 19]},
    *slow({"q_lengths": [3, 1, 17, 5]}, {"q_lengths": [20]}, {"q_lengths": [4, 9, 2], "kv_lengths": [3, 20, 0]}),
], ids=str)  # fmt: skip
def test_packed_sequences(device, fresh_seed, dtype, case):
    assert_as_near_as_pytorch(make_packed(device, dtype=dtype, **case))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_dense(device, fresh_seed, kernel, causal):
    dense = make(device, B=3, Nq=11, H=1, causal=causal)
    starts = torch.tensor([0, 11, 22, 33], dtype=torch.int32, device=device)
    options = {"causal": causal, "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    packed = Case([x.flatten(0, 1) for x in dense.tensors], dense.dout.flatten(0, 1), options)
    for a, b in zip(dense.run("triton"), packed.run("triton"), strict=True):
        assert torch.equal(a.flatten(0, 1), b)


def call(case: Case) -> tuple[Tensor, Tensor]:
    q, k, v = case.tensors
    causal, lengths = case.options.get("causal", False), case.options.get("kv_lengths")
    return op.triton_attention((q, k, v), None, None, lengths, q.shape[1], k.shape[1], causal, q.shape[-1] ** -0.5)


def test_log_sum_exp(device, fresh_seed, kernel):
    case = make(device, B=3, Nq=21, kv_lengths=[21, 2, 0])
    _, lse_HR = call(case)
    q, k, _ = (x.double() for x in case.tensors)
    scores = torch.einsum("bqhd,bkhd->hbqk", q, k) * q.shape[-1] ** -0.5
    hidden = torch.arange(21, device=device) >= case.options["kv_lengths"][:, None]
    expected = scores.masked_fill(hidden[None, :, None], -torch.inf).logsumexp(-1).flatten(1)
    torch.testing.assert_close(lse_HR.double() * torch.log(torch.tensor(2.0)).item(), expected, atol=1e-5, rtol=1e-6)
    assert (lse_HR[:, 42:] == -torch.inf).all()


def test_a_row_of_padding_alone_gives_zero_and_takes_no_gradient(device, fresh_seed, kernel):
    for x in make(device, Nq=5, kv_lengths=[0, 5]).run("triton"):
        assert (x[0] == 0).all() and (x[1] != 0).any() and x.isfinite().all()


def test_what_stands_in_the_padding_does_not_matter(device, fresh_seed, kernel):
    case = make(device, B=2, Nq=20, H=1, kv_lengths=[3, 18])
    before = case.run("triton")
    for x in case.tensors[1:]:
        x[0, 3:], x[1, 18:] = torch.nan, torch.inf
    for a, b in zip(before, case.run("triton"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("packed", [True, *slow(False)])
def test_every_element_is_written_and_nothing_beyond_is_touched(device, fresh_seed, kernel, monkeypatch, packed):
    if packed:
        case = make_packed(device, [5, 0, 18], [3, 2, 20], H=2, D=24)
    else:
        case = make(device, B=2, Nq=18, Nk=20, H=2, D=24, kv_lengths=[20, 0])
    expected = case.run("triton")
    buffers = []

    def guarded(*shape, **_) -> Tensor:
        size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape).numel()
        buffers.append((torch.full((size + 8192,), POISON, device=device), size))
        return buffers[-1][0][4096 : 4096 + size].view(*shape)

    def surrounded(x: Tensor) -> Tensor:
        buffer = torch.full((x.numel() + 8192,), torch.nan, device=device)
        buffer[4096:-4096] = x.flatten()
        return buffer[4096:-4096].view(x.shape)

    case.tensors, case.dout = [surrounded(x) for x in case.tensors], surrounded(case.dout)
    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: guarded(*x.shape))
    results = case.run("triton")
    monkeypatch.undo()
    assert len(buffers) == (5 if kernel == "small" else 6)  # out, log-sum-exp, dq, dk, dv, and rowsum(dout ∘ out)
    for buffer, size in buffers:
        assert (buffer[:4096] == POISON).all() and (buffer[4096 + size :] == POISON).all()
        assert (buffer[4096 : 4096 + size] != POISON).all()
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


def test_two_calls_agree_to_the_bit(device, fresh_seed, kernel):
    case = make(device, B=2, Nq=35, H=1, D=32, causal=True)
    for first, second in zip(case.run("triton"), case.run("triton"), strict=True):
        assert torch.equal(first, second)


def test_any_layout(device, fresh_seed, kernel):
    case = make(device, B=2, Nq=9, H=3, D=16)
    expected = case.run("triton")
    orders = [(0, 2, 1, 3), (1, 0, 2, 3), (3, 1, 2, 0)]  # each its own inverse
    turned = [x.permute(o).contiguous().permute(o) for x, o in zip(case.tensors, orders, strict=True)]
    dout = case.dout.transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(Case(turned, dout).run("triton"), expected, strict=True):
        assert torch.equal(a, b)
    q, k, v = case.tensors
    wide = attention(q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1), backend="triton")
    assert torch.equal(wide, attention(q, *(x[[0, 0]] for x in (k, v)), backend="triton"))


def test_nan_and_infinity_propagate(device, fresh_seed, kernel):
    for value in (torch.nan, torch.inf):
        case = make(device, B=2, Nq=5, H=1)
        case.tensors[0][1, 2, 0, 0] = value
        case.tensors[1][1, 0, 0, 0] = 1.0  # else all of the row's scores may be -inf, as where all is masked
        out, dq, dk, _ = case.run("triton")
        assert out[1, 2].isnan().any() and dq[1, 2].isnan().any() and dk[1].isnan().any()
        assert out[0].isfinite().all() and out[1, :2].isfinite().all()


def test_large_scores_do_not_overflow(device, fresh_seed, kernel):
    case = make(device, B=1, Nq=9, H=1)
    case.tensors[0] *= 1e4
    out, *gradients = case.run("triton")
    torch.testing.assert_close(out.double(), case.exact()[0], atol=1e-3, rtol=0)
    assert all(x.isfinite().all() for x in gradients)


def test_small_gradients_of_fp16_keep_their_range(device, fresh_seed, kernel):
    case = make(device, B=1, Nq=30, H=1, D=64, dtype=torch.float16, scale=2**-6)
    case.dout *= 2**-10
    assert_as_near_as_pytorch(case)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", *slow("eager")])
def test_torch_compile_sees_one_graph(device, fresh_seed, kernel, compiler, packed):
    torch._dynamo.reset()
    case = make_packed(device, [3, 9]) if packed else make(device, B=2, Nq=9, causal=True)
    expected = case.run("triton")
    layer = torch.compile(
        lambda q, k, v: attention(q * 1.0, k, v, **case.options, backend="triton") * 1.0,
        backend=compiler,
        fullgraph=True,
    )
    for a, b in zip(run(layer, case.tensors, case.dout), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(device, fresh_seed, kernel, use_reentrant):
    case = make(device, B=2, Nq=9)
    layer = functools.partial(attention, backend="triton")
    expected, leaves = case.run("triton"), [x.detach().requires_grad_() for x in case.tensors]
    checkpoint(layer, *leaves, use_reentrant=use_reentrant).backward(case.dout)
    for leaf, gradient in zip(leaves, expected[1:], strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_the_operators_are_registered_as_torch_library_wants_them(device, fresh_seed, kernel):
    q, k, v = (x.contiguous().requires_grad_() for x in make(device, B=2, Nq=9).tensors)
    torch.library.opcheck(op.triton_attention, ([q, k, v], None, None, None, 9, 9, True, 0.25))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = op.triton_attention([q, k, v], None, None, None, 9, 9, True, 0.25)
    torch.library.opcheck(
        op.triton_attention_backward, (out, [q, k, v], out.clone(), lse, None, None, None, 9, 9, True, 0.25)
    )


def test_autocast_computes_in_half_precision(device, fresh_seed):
    case = make(device, B=1, Nq=9)
    dtype = torch.bfloat16 if HAS_GPU else torch.float16
    with torch.autocast(device, dtype):
        out = attention(*case.tensors, backend="triton")
    assert out.dtype == dtype
    torch.testing.assert_close(out, attention(*(x.to(dtype) for x in case.tensors), backend="triton"), atol=0, rtol=0)


@needs_interpreter
def test_triton_on_cpu_needs_the_interpreter(device, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r'backend="triton" .* q is on cpu, which needs TRITON_INTERPRET=1'):
        make("cpu").run("triton")


LENGTHS = [1, 16, *range(49, 66), 196, 197, 255, 256, 257, 577, 1025]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [32, 64, 80, 88, 128])
@pytest.mark.parametrize("N", LENGTHS)
def test_every_size_on_a_gpu(device, fresh_seed, N, D, dtype):
    sizes = {"H": 5, "D": D, "dtype": dtype}
    for causal in (False, True):
        assert_as_near_as_pytorch(make(device, B=3, Nq=N, causal=causal, **sizes))
        assert_as_near_as_pytorch(make(device, B=3, Nq=N, causal=causal, kv_lengths=[N, N // 2, 0], **sizes))
        assert_as_near_as_pytorch(make_packed(device, [N, N // 3, 1], causal=causal, **sizes))
    assert_as_near_as_pytorch(make(device, B=3, Nq=64, Nk=N, **sizes))
    assert_as_near_as_pytorch(make_packed(device, [64, 7, N], [N, N // 2, 33], **sizes))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("N", [50, 257])
def test_two_calls_agree_to_the_bit_on_a_gpu(device, fresh_seed, N):
    case = make(device, B=64, Nq=N, H=16, D=80, dtype=torch.bfloat16)
    first = case.run("triton")
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, case.run("triton"), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(50, 64, False), (197, 32, False), (257, 80, True)], ids=str)
def test_the_sizes_of_the_model(device, fresh_seed, sizes):
    N, D, causal = sizes
    for dtype in (torch.float16, torch.float32):
        assert_as_near_as_pytorch(make(device, B=1, Nq=N, H=2, D=D, dtype=dtype, causal=causal))
