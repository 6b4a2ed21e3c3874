"""The Triton masked-patch loss against float64 and the eager reference: on a GPU, or else in the interpreter."""

import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mug.kernels import masked_patch_loss as module
from mug.kernels.masked_patch_loss import gather_patches, masked_patch_loss

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POISON = 777.0
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the interpreter rounds bf16 wrongly")
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU Triton does not take CPU tensors")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)]


@dataclass
class Case:
    image: Tensor
    prediction: Tensor
    masked: Tensor
    patch_size: int
    counts: Tensor | None = None
    normalize: bool = True

    def loss(self, prediction: Tensor | None = None, backend: str = "triton") -> Tensor:
        prediction = self.prediction if prediction is None else prediction
        options = {"patch_size": self.patch_size, "mean": MEAN, "std": STD, "normalize_patches": self.normalize}
        return masked_patch_loss(
            self.image, prediction, self.masked, counts_B=self.counts, backend=backend, **options
        )  # fmt: skip

    def loss_and_gradient(self, backend: str, grad_output: float = 1.0) -> tuple[Tensor, Tensor]:
        prediction = self.prediction.clone().requires_grad_()
        loss = self.loss(prediction, backend)
        (loss * grad_output).backward()
        return loss.detach(), prediction.grad

    def exact(self, grad_output: float = 1.0) -> tuple[Tensor, Tensor]:
        """Loss and gradient in float64."""
        B, M, P = self.prediction.shape
        unit = 255 if self.image.dtype == torch.uint8 else 1
        mean, std = (torch.tensor(x, dtype=torch.float64, device=self.image.device) for x in (MEAN, STD))
        counts = torch.full((B,), M) if self.counts is None else self.counts
        counted = torch.arange(M, device=counts.device) < counts[:, None]
        pixels = gather_patches(
            self.image.double() / unit, self.masked.where(counted.to(self.masked.device), 0), self.patch_size
        )
        target = ((pixels.unflatten(-1, (-1, 3)) - mean) / std).flatten(-2)
        if self.normalize:
            variance, centre = torch.var_mean(target, -1, keepdim=True)
            target = (target - centre) / (variance + 1e-6).sqrt()
        error = (self.prediction.double() - target) * counted[..., None].to(target.device)
        total = max(int(counts.sum()), 1) * P
        return error.square().sum() / total, 2 * grad_output / total * error


def make(device, patch_size=8, dtype=torch.float32, *, B=2, M=3, grid=(2, 3), image="uint8", **options) -> Case:
    H, W = grid[0] * patch_size, grid[1] * patch_size
    pixels = torch.randint(0, 256, (B, 3, H, W), dtype=torch.uint8)
    if image == "flat":
        pixels[:] = pixels[:, :, :1, :1]
    if image == "saturated":
        pixels = torch.where(pixels < 128, 0, 255).byte()
    if image == "float":
        pixels = pixels / 255
    if image == "half":
        pixels = (pixels / 255).half()
    masked = torch.stack([torch.randperm(grid[0] * grid[1])[:M] for _ in range(B)])
    prediction = torch.randn(B, M, 3 * patch_size**2).to(dtype)
    return Case(pixels.to(device), prediction.to(device), masked.to(device), patch_size, **options)


def assert_as_near_as_eager(case: Case, grad_output: float) -> None:
    exact_loss, exact_gradient = case.exact(grad_output)
    losses, gradients = zip(*(case.loss_and_gradient(b, grad_output) for b in ("triton", "reference")), strict=True)
    ours, eagers = ((x.double() - exact_loss).abs() for x in losses)
    assert losses[0].dtype == torch.float32 and losses[0].shape == ()
    assert ours <= 2 * eagers + 2**-22 * exact_loss, f"loss is off by {ours:.2e}, eager by {eagers:.2e}"
    # Another grad_output than a power of two is a second rounding in half precision: 2x on average, not at most.
    norm = torch.max if math.frexp(grad_output)[0] == 0.5 else lambda x: x.square().mean().sqrt()
    ours, eagers = (norm((x.double() - exact_gradient).abs()) for x in gradients)
    floor = 2**-24 + 2**-22 * exact_gradient.abs().max()  # fp16's smallest number; fp32's rounding
    assert gradients[0].dtype == case.prediction.dtype
    assert ours <= 2 * eagers + floor, f"gradient is off by {ours:.2e}, eager by {eagers:.2e}"


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("patch_size", [8, 14, 16, 32])
def test_patch_sizes_and_dtypes(device, fresh_seed, patch_size, dtype, normalize):
    for M in (1, 5):
        case = make(device, patch_size, dtype, B=3, M=M, normalize=normalize)
        assert_as_near_as_eager(case, grad_output=1024.0)
        assert_as_near_as_eager(case, grad_output=-1000.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("image", ["flat", "saturated", "float", "half"])
def test_images(device, fresh_seed, image, dtype):
    for patch_size in (8, 14):
        assert_as_near_as_eager(make(device, patch_size, dtype, image=image), grad_output=1.0)


def test_a_patch_without_any_contrast_has_the_target_zero(device, fresh_seed):
    case = make(device, 16)
    value = torch.tensor(MEAN)[:, None, None] + 0.7 * torch.tensor(STD)[:, None, None]  # one figure once normalised
    case.image = value.expand(2, 3, 32, 48).to(device)
    loss, gradient = case.loss_and_gradient("triton")
    assert loss.item() == pytest.approx(case.prediction.square().mean().item(), rel=1e-3)
    torch.testing.assert_close(gradient, 2 * case.prediction / case.prediction.numel(), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [(3, 0, 1), (0, 0, 0), (3, 3, 3)])
@pytest.mark.parametrize("counts_dtype", [torch.int32, torch.int64], ids=str)
def test_ragged_counts(device, fresh_seed, counts, counts_dtype, dtype):
    case = make(device, 8, dtype, B=3, counts=torch.tensor(counts, dtype=counts_dtype, device=device))
    for b, count in enumerate(counts):  # what stands there must not matter
        case.masked[b, count:] = -1
        case.prediction[b, count:] = torch.nan
    for backend in ("triton", "reference"):
        loss, gradient = case.loss_and_gradient(backend)
        assert all((gradient[b, count:] == 0).all() for b, count in enumerate(counts)), backend
        assert loss.isfinite() and gradient.isfinite().all(), backend
    case.prediction.nan_to_num_(0.0)
    assert_as_near_as_eager(case, grad_output=1.0)


def test_full_counts_give_the_loss_without_counts(device, fresh_seed):
    case = make(device)
    before = case.loss()
    case.counts = torch.tensor([3, 3], device=device)
    torch.testing.assert_close(case.loss(), before, atol=0, rtol=1e-6)


@pytest.mark.parametrize("patch_size", [8, 14])
@pytest.mark.parametrize("ragged", [False, True])
def test_every_element_is_written_and_none_beyond(device, fresh_seed, monkeypatch, patch_size, ragged):
    counts = torch.tensor([1, 0, 4], device=device) if ragged else None
    case = make(device, patch_size, B=3, M=5, counts=counts)
    case.prediction.requires_grad_()
    buffers = []

    def guarded(shape: tuple[int, ...]) -> Tensor:
        size = torch.Size(shape).numel()
        buffers.append((torch.full((size + 4096,), POISON, device=device), size))
        return buffers[-1][0][2048 : 2048 + size].view(shape)

    monkeypatch.setattr(torch, "empty", lambda *shape, **_: guarded(shape))
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: guarded(x.shape))
    case.loss()
    assert [size for _, size in buffers] == [case.prediction.numel(), 15]  # gradient, loss of each patch
    for buffer, size in buffers:
        assert (buffer[:2048] == POISON).all() and (buffer[2048 + size :] == POISON).all()
        assert (buffer[2048 : 2048 + size] != POISON).all()


def test_without_need_of_it_no_gradient_is_kept(device, fresh_seed, monkeypatch):
    case = make(device)
    expected = case.loss(case.prediction.clone().requires_grad_()).item()
    monkeypatch.setattr(torch, "empty_like", lambda *_, **__: pytest.fail("allocated"))
    assert case.loss().item() == expected
    with torch.no_grad():
        assert case.loss(case.prediction.clone().requires_grad_()).item() == expected


def test_two_calls_agree_to_the_bit(device, fresh_seed):
    case = make(device, B=4)
    first, second = (case.loss_and_gradient("triton", 0.3) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("grad_output", [0.0, -2.5, 65536.0, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_grad_output(device, fresh_seed, grad_output, dtype):
    case = make(device, 16, dtype)
    _, ours = case.loss_and_gradient("triton", grad_output)
    _, expected = case.loss_and_gradient("reference", grad_output)
    atol = 1e-9 * abs(grad_output) if math.isfinite(grad_output) else 0.0
    torch.testing.assert_close(ours, expected, equal_nan=True, atol=max(atol, 1e-6), rtol=4 * torch.finfo(dtype).eps)


def test_small_gradients_in_fp16_survive_a_large_loss_scale(device, fresh_seed):
    case = make(device, 8, torch.float16)
    case.counts = torch.tensor([1, 0], device=device)
    case.prediction.copy_(case.prediction * 1e-3)
    case.image = torch.full_like(case.image, 128)
    _, exact = case.exact(4096.0)
    _, gradient = case.loss_and_gradient("triton", 4096.0)
    torch.testing.assert_close(gradient.double(), exact, atol=1e-6, rtol=2e-3)


def test_a_second_walk_through_the_graph_is_refused(device, fresh_seed):
    case = make(device)
    loss = case.loss(case.prediction.requires_grad_())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_propagate(device, fresh_seed, value):
    case = make(device)
    case.prediction[1, 2, 3] = value
    loss, gradient = case.loss_and_gradient("triton")
    assert torch.equal(loss.isnan(), torch.tensor(value).to(device).isnan()) and not loss.isfinite()
    wrong = ~gradient.isfinite()
    assert wrong[1, 2, 3] and wrong.sum() == 1


def test_nan_in_the_image_propagates(device, fresh_seed):
    case = make(device, image="float")
    case.masked[0, 0] = 0
    case.image[0, 1, 2, 3] = torch.nan
    loss, gradient = case.loss_and_gradient("triton")
    assert loss.isnan() and gradient[0, 0].isnan().all() and gradient[1].isfinite().all()


def test_an_index_out_of_range_gives_nan_and_reads_nothing_beyond(device, fresh_seed, monkeypatch):
    monkeypatch.setattr(module, "_check_values", lambda *_: None)  # as on CUDA, where the host does not look
    for index in (-1, 6, 2**40):
        case = make(device)
        case.masked[1, 0] = index
        loss, gradient = case.loss_and_gradient("triton")
        assert loss.isnan() and gradient[1, 0].isnan().all() and gradient.isnan().sum() == gradient[1, 0].numel()


def test_tensors_that_are_not_contiguous(device, fresh_seed):
    case = make(device, 16)
    expected = case.loss_and_gradient("triton", 3.0)
    case.image = case.image.contiguous(memory_format=torch.channels_last)
    case.prediction = case.prediction.transpose(1, 2).contiguous().transpose(1, 2)
    case.masked = case.masked.T.contiguous().T
    loss, gradient = case.loss_and_gradient("triton", 3.0)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_torch_compile_sees_one_graph(device, fresh_seed, compiler, ragged, dtype):
    torch._dynamo.reset()
    counts = torch.tensor([1, 3], device=device) if ragged else None
    case = make(device, 8, dtype, counts=counts)
    expected = case.loss_and_gradient("triton", 3.0)

    @torch.compile(backend=compiler, fullgraph=True)
    def compiled(prediction):
        return case.loss(prediction * 1.0) * 3.0

    prediction = case.prediction.clone().requires_grad_()
    loss = compiled(prediction)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0] * 3.0)
    torch.testing.assert_close(prediction.grad, expected[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(device, fresh_seed, use_reentrant):
    case = make(device)
    expected = case.loss_and_gradient("triton", 0.5)
    prediction = case.prediction.clone().requires_grad_()
    loss = checkpoint(case.loss, prediction, use_reentrant=use_reentrant)
    (loss * 0.5).backward()
    assert torch.equal(loss.detach(), expected[0]) and torch.equal(prediction.grad, expected[1])


def test_the_operator_is_registered_as_torch_library_wants_it(device, fresh_seed):
    case = make(device)
    arguments = (case.image, case.prediction.requires_grad_(), case.masked, None, 8, list(MEAN), list(STD), True, True)
    torch.library.opcheck(torch.ops.mug.masked_patch_loss, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_interpreter
def test_auto_takes_the_reference_on_cpu(monkeypatch, device):
    monkeypatch.setattr(module, "_fused", lambda *_: pytest.fail("took the kernel"))
    make("cpu").loss(backend="auto")


@needs_gpu
def test_auto_takes_the_kernel_on_a_gpu_and_logs_it_once(monkeypatch, caplog, device):
    module._log_choice.cache_clear()
    caplog.set_level(logging.INFO)
    case = make(device)
    assert case.loss(backend="auto") == case.loss() == case.loss(backend="auto")
    assert [r.message for r in caplog.records] == ["masked_patch_loss: triton"]


@needs_interpreter
def test_triton_on_cpu_needs_the_interpreter(monkeypatch, device):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r'backend="triton" .* prediction is on cpu, which needs TRITON_INTERPRET=1'):
        make("cpu").loss()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prediction": torch.zeros(2, 3, 192, dtype=torch.float64)}, "prediction is torch.float64"),
        ({"image": torch.zeros(2, 3, 16, 24, dtype=torch.int32)}, "image is torch.int32"),
        ({"masked": torch.zeros(2, 3, dtype=torch.int32)}, "masked is torch.int32, not int64"),
        ({"counts": torch.ones(2)}, "counts is torch.float32, not int32 or int64"),
        ({"patch_size": 4, "prediction": torch.zeros(2, 3, 48)}, "patch_size=4 of 3 channels"),
        ({"image": torch.zeros(2, 1, 16, 24), "prediction": torch.zeros(2, 3, 64)}, "patch_size=8 of 1 channels"),
        ({"image": torch.zeros(2, 3, 16, 24, device="meta")}, "image and prediction are on different devices"),
    ],
    ids=["prediction", "image", "masked", "counts", "patch", "channels", "device"],
)
def test_what_the_kernel_does_not_serve_is_named(device, change, message):
    case = make(device)
    for name, value in change.items():
        keep = not isinstance(value, Tensor) or value.is_meta
        setattr(case, name, value if keep else value.to(device))
    with pytest.raises(ValueError, match=f'backend="triton" cannot serve this call: {message}'):
        case.loss()


def test_wrong_values_are_named_on_cpu():
    case = make("cpu")
    with pytest.raises(ValueError, match="backend='cuda' is not one of auto, triton, reference"):
        case.loss(backend="cuda")
    case.masked[0, 0] = 6
    with pytest.raises(ValueError, match=r"masked names patches \d to 6, the image has 6"):
        case.loss(backend="reference")
    case.counts = torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"counts must lie in 0..3, got \[0, 4\]"):
        case.loss(backend="reference")
    case.counts = torch.tensor([1])
    with pytest.raises(ValueError, match=r"counts has shape \(1,\), expected \(2,\)"):
        case.loss(backend="reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("patch_size", [8, 16])
def test_pixels_that_are_not_on_whole_words_and_many_turns_of_the_loop(device, fresh_seed, patch_size, dtype):
    case = make(device, patch_size, dtype, B=7, M=5, counts=torch.tensor([5, 0, 3, 5, 1, 5, 4], device=device))
    expected = case.loss_and_gradient("triton", 3.0)
    buffer = case.image.new_empty(case.image.numel() + 1)
    case.image = buffer[1:].view(case.image.shape).copy_(case.image)
    assert case.image.data_ptr() % 4
    loss, gradient = case.loss_and_gradient("triton", 3.0)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])
    torch.testing.assert_close(gradient.double(), case.exact(3.0)[1], atol=1e-4, rtol=2e-3)


def test_as_many_programs_as_a_gpu_holds(device, monkeypatch):
    from mug.kernels import masked_patch_loss_triton as kernels

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    for patch_size, rows, expected in [(16, 37632, 2112), (16, 100, 100), (8, 37633, 2112), (8, 5, 2), (32, 9408, 528)]:
        tile = kernels.tile(patch_size, torch.bfloat16)
        assert kernels._programs(torch.device("cuda", 1), rows, tile) == expected


def test_kernels_are_launched_on_the_device_of_their_tensors(device, fresh_seed, monkeypatch):
    """Triton launches on the current device, which need not be the tensors'."""
    from mug.kernels import linear_cross_entropy_triton, masked_patch_loss_triton

    inside, launched = [], []

    @contextmanager
    def device_of(x):
        inside.append(x.device)
        yield
        inside.pop()

    class Watched:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.append((self.name, *inside))
            return self.kernel[grid]

    def watch(module, name):
        monkeypatch.setattr(module, name, Watched(name, getattr(module, name)))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    watch(masked_patch_loss_triton, "_loss_kernel")
    watch(masked_patch_loss_triton, "_scale_kernel")
    watch(linear_cross_entropy_triton, "_loss_kernel")
    case = make(device)
    case.loss_and_gradient("triton", 3.0)
    linear_cross_entropy_triton.loss_to_gradient_(
        torch.randn(2, 64, device=device), torch.tensor([0, 63], device=device), 0.0, 0.0, 1.0, True
    )
    assert launched == [(name, case.image.device) for name in ("_loss_kernel", "_scale_kernel", "_loss_kernel")]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one(device, fresh_seed):
    case = make("cuda:1", 16, torch.bfloat16)
    assert_as_near_as_eager(case, grad_output=3.0)
