"""Both CPU backends of attention against a plain softmax in float64, forward and gradients."""

import pytest
import torch

from mug.kernels.attention import attention

BACKENDS = ["sdpa", "reference"]


def plain_attention(q, k, v, causal=False, kv_lengths=None, scale=None):
    """One query at a time, over the keys that it may see, in float64."""
    B, Nq, _, D = q.shape
    scale = D**-0.5 if scale is None else scale
    out = 0 * (q + k.sum() + v.sum())
    for b in range(B):
        for i in range(Nq):
            seen = k.shape[1] if kv_lengths is None else min(kv_lengths[b], k.shape[1])
            seen = min(seen, i + 1) if causal else seen
            if seen:
                scores = torch.einsum("hd,khd->hk", q[b, i], k[b, :seen]) * scale
                out[b, i] = torch.einsum("hk,khd->hd", scores.softmax(-1), v[b, :seen])
    return out


def random_qkv(B, Nq, Nk, H, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, Nq, H, D), (B, Nk, H, D), (B, Nk, H, D)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


CASES = {
    "self": ((2, 7, 7, 3, 16), {}),
    "one token": ((1, 1, 1, 1, 8), {}),
    "uneven": ((1, 17, 17, 3, 20), {}),
    "cross": ((3, 5, 13, 2, 8), {}),
    "causal": ((2, 9, 9, 2, 16), {"causal": True}),
    "scale": ((2, 6, 6, 2, 16), {"scale": 0.7}),
    "lengths": ((4, 5, 9, 2, 8), {"kv_lengths": [9, 4, 1, 0]}),
    "causal lengths": ((4, 6, 6, 2, 8), {"causal": True, "kv_lengths": [6, 3, 1, 0]}),
    "no keys at all": ((2, 3, 4, 2, 8), {"kv_lengths": [0, 0]}),
    "lengths beyond the keys": ((2, 3, 4, 2, 8), {"kv_lengths": [4, 7]}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_plain_softmax(name, backend):
    sizes, options = CASES[name]
    exact = [x.requires_grad_() for x in random_qkv(*sizes)]
    ours = [x.detach().float().requires_grad_() for x in exact]
    expected = plain_attention(*exact, **options)
    if "kv_lengths" in options:
        options = {**options, "kv_lengths": torch.tensor(options["kv_lengths"])}
    out = attention(*ours, **options, backend=backend)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * weight).sum().backward()
    (out * weight.float()).sum().backward()
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_of_padding_alone_gives_zero_and_takes_no_gradient(backend, causal):
    q, k, v = (x.float().requires_grad_() for x in random_qkv(2, 5, 5, 2, 8))
    out = attention(q, k, v, causal=causal, kv_lengths=torch.tensor([0, 5]), backend=backend)
    assert (out[0] == 0).all() and (out[1] != 0).any()
    out.square().sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
        assert (x.grad[0] == 0).all() and (x.grad[1] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_keys_do_not_matter(backend):
    q, k, v = (x.float() for x in random_qkv(2, 4, 6, 2, 8))
    lengths = torch.tensor([2, 5])
    before = attention(q, k, v, kv_lengths=lengths, backend=backend)
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = 1e4, -1e4
    assert torch.equal(attention(q, k, v, kv_lengths=lengths, backend=backend), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_into_one_qkv_tensor(backend):
    qkv = torch.randn(2, 6, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    out = attention(*qkv.unbind(2), backend=backend)
    expected = plain_attention(*qkv.double().unbind(2))
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_bfloat16_and_near(backend):
    q, k, v = (x.bfloat16() for x in random_qkv(2, 20, 20, 2, 16))
    out = attention(q, k, v, causal=True, backend=backend)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.double(), plain_attention(q.double(), k.double(), v.double(), causal=True), atol=3e-2, rtol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    q, k, v = (x.float() for x in random_qkv(1, 5, 5, 1, 8))
    out = attention(q * 1e4, k, v, backend=backend)
    expected = plain_attention(q.double() * 1e4, k.double(), v.double())
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=0)


def test_auto_serves_the_cpu():
    q, k, v = (x.float() for x in random_qkv(2, 5, 5, 2, 8))
    expected = plain_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(attention(q, k, v).double(), expected, atol=2e-6, rtol=1e-5)


def test_an_unknown_backend_is_named():
    q, k, v = random_qkv(1, 2, 2, 1, 4)
    with pytest.raises(ValueError, match=r"'flash9' is not one of auto, triton, sdpa, .*, reference"):
        attention(q, k, v, backend="flash9")


@pytest.mark.parametrize(
    "k_shape, v_shape",
    [
        ((2, 5, 2, 8), (2, 6, 2, 8)),
        ((3, 5, 2, 8), (3, 5, 2, 8)),
        ((2, 5, 1, 8), (2, 5, 1, 8)),
        ((2, 5, 2, 4), (2, 5, 2, 4)),
    ],
    ids=["k and v", "batch", "heads", "head dimension"],
)
def test_shapes_that_disagree_are_shown(k_shape, v_shape):
    with pytest.raises(ValueError, match="must agree") as error:
        attention(torch.zeros(2, 5, 2, 8), torch.zeros(k_shape), torch.zeros(v_shape))
    for shape in [(2, 5, 2, 8), k_shape, v_shape]:
        assert str(shape) in str(error.value)


def test_causal_needs_as_many_queries_as_keys():
    q, k, v = random_qkv(1, 2, 3, 1, 4)
    with pytest.raises(ValueError, match="as many queries as keys, got 2 and 3"):
        attention(q, k, v, causal=True)
