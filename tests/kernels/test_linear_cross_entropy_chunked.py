"""The caption head in chunks, in PyTorch and with its Triton kernel, against float64 and the eager reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mug.kernels import linear_cross_entropy as module
from mug.kernels.linear_cross_entropy import linear_cross_entropy

PAD = 3
DRAWS = 16
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HAS_GPU = torch.cuda.is_available()
needs_interpreter = pytest.mark.skipif(HAS_GPU, reason="on a GPU Triton does not take CPU tensors")


@pytest.fixture(params=["chunked", "triton"])
def backend(request, device, monkeypatch) -> str:
    """With blocks so small that the kernel goes around its loops more than once."""
    if request.param == "triton":
        from mug.kernels import linear_cross_entropy_triton as kernels

        monkeypatch.setattr(kernels, "BLOCK", 256)
    return request.param


def skip_what_the_interpreter_rounds_wrongly(backend, dtype):
    if backend == "triton" and dtype == torch.bfloat16 and not HAS_GPU:
        pytest.skip("the interpreter rounds bf16 wrongly")


def make(device, N=23, D=16, V=61, dtype=torch.float32, padding=0.3):
    hidden, weight = torch.randn(N, D), torch.randn(V, D) * D**-0.5
    target = torch.randint(PAD + 1, V, (N,)).where(torch.rand(N) >= padding, PAD)
    target[0] = V - 1
    return [hidden.to(device, dtype), weight.to(device, dtype), target.to(device)]


def budget_of(rows, weight, backend):
    """Bytes of so many rows of logits, which are padded to 64."""
    half = 2 if backend == "triton" else 8
    return rows * -(-len(weight) // 64) * 64 * (4 if weight.dtype == torch.float32 else half)


def results(example, backend, grad_output=1.0, rows=5, **options):
    """(loss, accuracy, gradient by hidden, by weight); chunks of `rows` rows."""
    hidden, weight, target = example
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    budget = budget_of(rows, weight, backend)
    loss, accuracy = linear_cross_entropy(
        hidden, weight, target, ignore_index=PAD, memory_budget=budget, backend=backend, **options
    )
    (loss * grad_output).backward()
    return loss.detach(), accuracy, hidden.grad, weight.grad


def exact(example, grad_output, label_smoothing=0.0, z_loss=0.0):
    hidden, weight = (x.double().requires_grad_() for x in example[:2])
    logits, target = hidden @ weight.T, example[2]
    loss = F.cross_entropy(logits, target, ignore_index=PAD, label_smoothing=label_smoothing)
    loss = loss + z_loss * logits[target != PAD].logsumexp(-1).square().mean()
    (loss * grad_output).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(23, 16, 61), (1, 65, 5), (9, 32, 1023)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.2, "z_loss": 1e-3}]
)
@pytest.mark.parametrize("grad_output", [1.0, -37.3])
def test_as_near_to_float64_as_eager(device, backend, fresh_seed, dtype, shape, options, grad_output):
    skip_what_the_interpreter_rounds_wrongly(backend, dtype)
    squares, largest = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for _ in range(DRAWS if shape[0] == 1 else 1):  # of one row, a single logit's luck would decide
        example = make(device, *shape, dtype=dtype)
        truth = exact(example, grad_output, **options)
        ours, _, *our_gradients = results(example, backend, grad_output, **options)
        eagers, _, *eager_gradients = results(example, "reference", grad_output, **options)
        assert ours.dtype == torch.float32 and [x.dtype for x in our_gradients] == [dtype, dtype]
        floor = 2**-21 * (1 + truth[0].abs())  # a small loss is a difference of larger numbers
        assert (ours - truth[0]).abs() <= 2 * (eagers - truth[0]).abs() + floor
        for i, (x, eager, expected) in enumerate(zip(our_gradients, eager_gradients, truth[1:], strict=True)):
            candidates = (x, eager, expected.to(dtype))  # the last: what rounding alone costs, where eager was lucky
            squares[i] += torch.stack([(y.double() - expected).square().mean().cpu() for y in candidates])
            largest[i] = torch.maximum(largest[i], expected.abs().max().cpu())
    for (error, eager_error, rounding), most in zip(squares.sqrt(), largest, strict=True):
        assert error <= 2 * max(eager_error, rounding) + 2**-22 * most


@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
def test_the_chunk_does_not_matter(device, backend, fresh_seed, rows):
    example = make(device)
    for x, expected in zip(results(example, backend, rows=rows), results(example, "reference"), strict=True):
        torch.testing.assert_close(x, expected, atol=1e-6, rtol=1e-5)


@pytest.fixture
def chunk_sizes(monkeypatch) -> list[int]:
    """Rows of each chunk whose logits became gradients."""
    sizes, choose = [], module._loss_to_gradient_

    def record(triton):
        return lambda logits_RV, *rest: sizes.append(len(logits_RV)) or choose(triton)(logits_RV, *rest)

    monkeypatch.setattr(module, "_loss_to_gradient_", record)
    return sizes


def test_no_chunk_is_larger_than_the_budget(device, backend, fresh_seed, chunk_sizes):
    example = make(device)
    results(example, backend, rows=5)
    assert max(chunk_sizes) <= 5 and sum(chunk_sizes) == (example[2] != PAD).sum()


@pytest.mark.parametrize("kept, budget, expected", [
    (23, 5, [5, 5, 5, 5, 3]), (23, 22, [12, 11]), (0, 5, [0]),
    (1100, 1000, [768, 332]), (1500, 767, [512, 512, 476]), (1000, 2000, [1000]), (1280, 600, [512, 512, 256]),
])  # fmt: skip
def test_chunks_are_equal_and_whole_tiles(chunk_sizes, kept, budget, expected):
    example = make("cpu", N=kept + 1, padding=0.0)
    example[2][0] = PAD  # of a mask that keeps nothing, too
    results(example, "chunked", rows=budget)
    assert chunk_sizes == expected


def test_the_first_chunk_writes_the_gradient_of_the_weight(device, backend, fresh_seed, monkeypatch):
    example = make(device)
    expected = results(example, backend)
    new_empty, new_zeros = torch.Tensor.new_empty, torch.Tensor.new_zeros

    def garbage(x, *shape, **options):
        new = new_empty(x, *shape, **options)
        return new.fill_(torch.nan) if new.is_floating_point() else new

    def zeros(x, shape, **options):
        assert shape != example[1].shape, "zeros as large as the weight"
        return new_zeros(x, shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", garbage)
    monkeypatch.setattr(torch.Tensor, "new_zeros", zeros)
    for x, y in zip(results(example, backend), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("free, expected", [(70 * 2**30, 2**31), (15 * 2**30, 2**30)])
def test_the_budget_on_a_gpu_is_asked_for_once(monkeypatch, free, expected):
    asked, device = [], torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (free, 80 * 2**30))
    module.default_budget.cache_clear()
    assert [module.default_budget(device) for _ in range(3)] == [expected] * 3
    assert asked == [device] and module.default_budget(torch.device("cpu")) == 512 * 2**20
    module.default_budget.cache_clear()


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_rows_to_keep_that_the_caller_knows(device, backend, fresh_seed, monkeypatch):
    hidden, weight, target = make(device)
    expected = results((hidden, weight, target), backend)
    kept = (target != PAD).nonzero().squeeze(1)
    monkeypatch.setattr(module, "_check_values", lambda *_: None)  # as on CUDA
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda _: pytest.fail("the host waits"))
    for x, y in zip(results((hidden, weight, target), backend, kept_K=kept), expected, strict=True):
        assert torch.equal(x, y)
    none = results((hidden, weight, target), backend, kept_K=kept[:0])
    assert none[0] == none[1] == 0 and (none[2] == 0).all() and (none[3] == 0).all()


def test_auto_takes_the_reference_where_it_fits(monkeypatch, fresh_seed):
    hidden, weight, target = make("cpu")
    monkeypatch.setattr(module, "_chunked", lambda *_: ("chunked", None))
    size = 23 * 61 * 12
    options = {"ignore_index": PAD}
    assert linear_cross_entropy(hidden, weight, target, memory_budget=size, **options)[0] != "chunked"
    assert linear_cross_entropy(hidden, weight, target, memory_budget=size - 1, **options)[0] == "chunked"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_kept_row_all_is_zero_and_gradients_are_there(device, backend, dtype):
    skip_what_the_interpreter_rounds_wrongly(backend, dtype)
    hidden, weight, target = make(device, dtype=dtype)
    loss, accuracy, *gradients = results((hidden, weight, torch.full_like(target, PAD)), backend)
    assert loss == 0 and accuracy == 0
    assert torch.equal(gradients[0], torch.zeros_like(hidden)) and torch.equal(gradients[1], torch.zeros_like(weight))


def test_ignored_rows_may_hold_anything(device, backend, fresh_seed):
    hidden, weight, target = make(device)
    expected = results((hidden, weight, target), backend)
    hidden[target == PAD] = torch.nan
    for x, y in zip(results((hidden, weight, target), backend), expected, strict=True):
        assert torch.equal(x, y)
    assert (expected[2][target == PAD] == 0).all()


def test_a_second_walk_through_the_graph_is_refused(device, fresh_seed):
    hidden, weight, target = make(device)
    loss, _ = linear_cross_entropy(hidden, weight.requires_grad_(), target, ignore_index=PAD, backend="chunked")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_propagate(device, backend, fresh_seed, value):
    hidden, weight, target = make(device)
    hidden[0, 0] = value
    loss, _, grad_hidden, _ = results((hidden, weight, target), backend)
    assert not loss.isfinite() and not grad_hidden[0].isfinite().all()


def test_large_logits_stay_finite(device, backend):
    example = (
        torch.eye(4, device=device) * 1e4,
        torch.eye(4, device=device),
        torch.tensor([0, 1, 2, 0], device=device),
    )
    loss, accuracy, *gradients = results(example, backend)
    assert loss.item() == pytest.approx(1e4 / 4) and accuracy == 0.75 and all(x.isfinite().all() for x in gradients)


def test_without_need_of_them_no_gradients_are_computed(device, backend, fresh_seed, monkeypatch):
    hidden, weight, target = make(device)
    expected = results((hidden, weight, target), backend)
    weight.requires_grad_()
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "_product", lambda *_: pytest.fail("computed"))
        loss, accuracy = linear_cross_entropy(hidden, weight, target, ignore_index=PAD, backend=backend)
    torch.testing.assert_close((loss, accuracy), expected[:2])
    hidden.requires_grad_(), weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, target, ignore_index=PAD, backend=backend)[0].backward()
    torch.testing.assert_close(hidden.grad, expected[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("known", [False, True])
def test_torch_compile_sees_one_graph(device, fresh_seed, compiler, dtype, known):
    torch._dynamo.reset()
    example = make(device, dtype=dtype)
    kept = (example[2] != PAD).nonzero().squeeze(1) if known else None
    expected = results(example, "chunked", rows=1000)
    hidden, weight = (x.clone().requires_grad_() for x in example[:2])

    @torch.compile(backend=compiler, fullgraph=True)
    def compiled(hidden, weight):
        return linear_cross_entropy(hidden, weight, example[2], ignore_index=PAD, kept_K=kept)

    loss, accuracy = compiled(hidden, weight)
    loss.backward()
    torch.testing.assert_close((loss.detach(), accuracy, hidden.grad, weight.grad), expected)
    assert not accuracy.requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(device, backend, fresh_seed, use_reentrant):
    example = make(device)
    expected = results(example, backend, rows=1000)
    hidden, weight = (x.clone().requires_grad_() for x in example[:2])

    def head(hidden):
        return linear_cross_entropy(hidden, weight, example[2], ignore_index=PAD, backend=backend)

    loss, _ = checkpoint(head, hidden, use_reentrant=use_reentrant)
    loss.backward()
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(hidden.grad, expected[2]) and torch.equal(weight.grad, expected[3])


def test_autocast_multiplies_in_half_precision(device, backend, fresh_seed):
    example = make(device)
    dtype = torch.bfloat16 if HAS_GPU or backend == "chunked" else torch.float16
    with torch.autocast(device, dtype):
        ours = results(example, backend)
    assert ours[2].dtype == ours[3].dtype == torch.float32
    expected = results([x.to(dtype) for x in example[:2]] + example[2:], backend)
    torch.testing.assert_close(ours[0], expected[0])


def test_small_gradients_in_fp16_survive_a_large_loss_scale(device, backend, fresh_seed):
    example = make(device, N=500, V=61, D=16, dtype=torch.float16)
    _, expected, _ = exact(example, 2.0**15)
    _, _, gradient, _ = results(example, backend, 2.0**15, rows=1000)
    assert (gradient.double() - expected).abs().max() < 5e-3 * expected.abs().max()


def test_small_probabilities_keep_their_digits_in_fp16(device, backend):
    hidden, weight, target = torch.randn(3, 16) / 8, torch.randn(61, 16) / 8, torch.tensor([7, 7, 7])
    hidden[:, 0], weight[:, 0], weight[7, 0] = 1, -5, 10  # all but one have 3e-7, five times fp16's smallest number
    example = [hidden.to(device, torch.float16), weight.to(device, torch.float16), target.to(device)]
    _, _, expected = exact(example, 1024.0)
    *_, gradient = results(example, backend, 1024.0)
    others = torch.arange(61, device=device) != 7
    error = (gradient.double() - expected)[others].norm() / expected[others].norm()
    assert error < 0.02


def test_the_operator_is_registered_as_torch_library_wants_it(device, backend, fresh_seed):
    hidden, weight, target = make(device)
    inputs = (hidden.requires_grad_(), weight.requires_grad_(), target)
    for kept, budget in [(None, 1000), ((target != PAD).nonzero().squeeze(1), None)]:
        arguments = (*inputs, kept, PAD, 0.0, 0.0, budget, backend == "triton", True, True)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.mug.linear_cross_entropy, arguments, test_utils=checks)


def test_what_is_wrong_is_named():
    hidden, weight, target = make("cpu")
    with pytest.raises(ValueError, match=r"backend='liger' is not one of auto, triton, chunked, reference"):
        linear_cross_entropy(hidden, weight, target, ignore_index=PAD, backend="liger")
    with pytest.raises(ValueError, match=r"cannot serve this call: hidden is torch.float64, weight torch.float32"):
        linear_cross_entropy(hidden.double(), weight, target, ignore_index=PAD, backend="chunked")
    with pytest.raises(ValueError, match=r"target is torch.int32, not torch.int64"):
        linear_cross_entropy(hidden, weight, target.int(), ignore_index=PAD)
    for value in (-1, 61):
        target[5] = value
        with pytest.raises(ValueError, match=f"target holds {value}, the vocabulary has 61"):
            linear_cross_entropy(hidden, weight, target, ignore_index=PAD)
    assert math.isfinite(linear_cross_entropy(hidden, weight, target, ignore_index=61)[0].item())


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_rows_to_keep_that_disagree_with_the_targets_are_named(backend):
    hidden, weight, target = make("cpu")
    kept = (target != PAD).nonzero().squeeze(1)
    options = {"ignore_index": PAD, "backend": backend}
    for wrong in (kept[1:], torch.cat([kept, kept[:1]]), torch.arange(23), kept - 100):
        with pytest.raises(ValueError, match=f"kept must name the {len(kept)} rows whose target is not {PAD}"):
            linear_cross_entropy(hidden, weight, target, kept_K=wrong, **options)
    for wrong in (kept.int(), kept[None]):
        with pytest.raises(ValueError, match=r"kept is torch.int\d\d \[.*\], not torch.int64 of one dimension"):
            linear_cross_entropy(hidden, weight, target, kept_K=wrong, **options)
    with pytest.raises(ValueError, match="kept is on meta, target on cpu"):
        linear_cross_entropy(hidden, weight, target, kept_K=kept.to("meta"), **options)
    expected = linear_cross_entropy(hidden, weight, target, **options)
    permuted = kept[torch.randperm(len(kept))]
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, target, kept_K=permuted, **options), expected)


@needs_interpreter
def test_triton_on_cpu_needs_the_interpreter(monkeypatch, device):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r'backend="triton" .* hidden is on cpu, which needs TRITON_INTERPRET=1'):
        results(make("cpu"), "triton")


@pytest.mark.parametrize("value", [-1, 61, 2**40])
def test_a_target_out_of_range_makes_the_loss_nan_and_touches_nothing_beyond(device, monkeypatch, value):
    monkeypatch.setattr(module, "_check", lambda *_: None)  # as on CUDA, where the host does not look
    example = make(device, padding=0.0)
    expected = results(example, "triton")
    example[2][3] = value
    loss, _, grad_hidden, _ = results(example, "triton")
    assert loss.isnan()
    others = torch.arange(23, device=device) != 3
    torch.testing.assert_close(grad_hidden[others], expected[2][others])


def test_the_kernel_writes_every_logit_and_nothing_beyond(device, backend):
    V, stride = 541, 576
    buffer = torch.full((5, stride), 777.0, device=device)
    logits = buffer[1:4, :V]  # what stands to the right of it is padding
    logits.copy_(torch.randn(3, V))
    target = torch.tensor([0, V - 1, 300], device=device)
    x = logits.clone().requires_grad_()
    loss = F.cross_entropy(x, target, reduction="none", label_smoothing=0.1)
    loss.sum().backward()
    loss_R, hit_R = module._loss_to_gradient_(backend == "triton")(logits, target, 0.1, 0.0, 2.0, True)
    torch.testing.assert_close(loss_R, loss)
    assert torch.equal(hit_R.bool(), x.argmax(1) == target)
    torch.testing.assert_close(logits, 2 * x.grad, atol=1e-6, rtol=1e-5)
    assert (buffer[[0, 4]] == 777).all()


def test_a_target_among_the_largest_is_a_hit(device, backend):
    logits = torch.zeros(3, 64, device=device)
    logits[:, [7, 40]] = 1.5
    target = torch.tensor([7, 40, 3], device=device)
    _, hit_R = module._loss_to_gradient_(backend == "triton")(logits, target, 0.0, 0.0, 1.0, False)
    assert hit_R.tolist() == [1, 1, 0]


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("V", [30522, 50304, 250_002])
def test_the_vocabularies_of_tokenizers_on_a_gpu(device, fresh_seed, V):
    example = make(device, 512, 64, V, dtype=torch.bfloat16)
    truth = exact(example, 1.0)
    for ours, eager, expected in zip(
        results(example, "triton", rows=100)[2:], results(example, "reference")[2:], truth[1:], strict=True
    ):
        error, eager_error = ((x.double() - expected).square().mean().sqrt() for x in (ours, eager))
        assert error <= 2 * eager_error
