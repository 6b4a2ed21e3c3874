"""What the kernel benchmark times: each op's shapes, its contenders, and its minimum work.

Dimension letters: B batch, M masked patches, P values of a patch, N tokens (Nq queries, Nk keys), V vocabulary,
H heads, D width of a token or of a head.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mug.kernels import attention, linear_cross_entropy, masked_patch_loss
from mug.model.encoder import PIXEL_MEAN, PIXEL_STD
from mug.model.objectives.mug import MUGConfig
from mug.model.presets import resolve
from mug.run.benchmarks.attention_shapes import Call, preset_calls, training_calls
from mug.run.benchmarks.kernel_timing import Work, Workload

OURS = {"masked_patch_loss": ("triton",), "linear_cross_entropy": ("triton", "chunked"), "attention": ("triton",)}
IMAGE_SIDE, MASK_RATIO = 224, 0.75
COMPILED = (50, 197)  # tokens at which attention is timed under torch.compile too, as each takes seconds to compile
PAD = 0  # not a target: every row counts


@dataclass(frozen=True)
class Sizes:
    """dtype of floating inputs; B of the masked-patch loss; (N, V, D) of the head; (B, call) of attention."""

    dtype: torch.dtype
    images: int
    head: tuple[int, int, int]
    attention: tuple[tuple[int, Call], ...]


def _gpu_attention() -> tuple[tuple[int, Call], ...]:
    """Returns the presets' calls, then a grid around them."""
    heads = {32: 16, 64: 12, 80: 16, 88: 16}  # by head dimension: pixel decoder, ViT-B, ViT-H, ViT-g
    grid = [(N, D) for N in (50, 64, 197, 257, 577) for D in heads]
    others = [Call(N, N, heads[D], D, causal=False, packed=False) for N, D in grid]
    calls = dict.fromkeys([*preset_calls(), *others])
    return tuple((256 if call.keys < 577 else 64, call) for call in calls)  # the reference holds all scores in fp32


SIZES = {
    "cuda": Sizes(torch.bfloat16, images=256, head=(16384, 30522, 768), attention=_gpu_attention()),
    "cpu": Sizes(
        torch.float32,
        images=8,
        head=(512, 4096, 192),
        attention=tuple((4, call) for call in training_calls(resolve(MUGConfig("base")))),
    ),
}


def patch_workloads(device: torch.device) -> Iterator[Workload]:
    """Patch 16 and 14 of 224 px images, 75% masked, from uint8."""
    sizes = SIZES[device.type]
    for patch_size in (16, 14):
        patches = (IMAGE_SIDE // patch_size) ** 2
        B, M, P = sizes.images, patches - int(patches * (1 - MASK_RATIO)), 3 * patch_size**2
        image = torch.randint(0, 256, (B, 3, IMAGE_SIDE, IMAGE_SIDE), dtype=torch.uint8, device=device)
        prediction = torch.randn(B, M, P, device=device, dtype=sizes.dtype, requires_grad=True)
        masked = torch.rand(B, patches, device=device).argsort(1)[:, :M].contiguous()
        call = partial(_patch_loss, patch_size=patch_size)
        contenders = {
            "triton": partial(call, backend="triton"),
            "reference": partial(call, backend="reference"),
            "every patch": partial(every_patch_loss, patch_size=patch_size),
        }
        inputs = (image, prediction, masked)
        yield Workload(
            "masked_patch_loss",
            f"B={B} patch={patch_size} M={M}",
            inputs,
            _with_compiled(contenders, device),
            {"both": patch_work(B, M, P, prediction.element_size())},
        )


def _patch_loss(image: Tensor, prediction: Tensor, masked: Tensor, *, patch_size: int, backend: str) -> Tensor:
    options = {"patch_size": patch_size, "mean": PIXEL_MEAN, "std": PIXEL_STD}
    return masked_patch_loss.masked_patch_loss(image, prediction, masked, backend=backend, **options)


def every_patch_loss(image_BCHW: Tensor, prediction_BMP: Tensor, masked_BM: Tensor, *, patch_size: int) -> Tensor:
    """Returns the naive loss: normalise all pixels, cut all patches, normalise all, pick the masked."""
    B, C, H, W = image_BCHW.shape
    mean, std = (torch.tensor(x, device=image_BCHW.device).view(3, 1, 1) for x in (PIXEL_MEAN, PIXEL_STD))
    pixels = (image_BCHW.float() / 255 - mean) / std
    grid = pixels.view(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    target_BNP = torch.einsum("bchpwq->bhwpqc", grid).reshape(B, -1, prediction_BMP.shape[-1])
    variance, centre = target_BNP.var(-1, keepdim=True), target_BNP.mean(-1, keepdim=True)
    target_BNP = (target_BNP - centre) / (variance + 1e-6).sqrt()
    target_BMP = target_BNP.gather(1, masked_BM[..., None].expand_as(prediction_BMP))
    return F.mse_loss(prediction_BMP.float(), target_BMP)


def patch_work(B: int, M: int, P: int, element_size: int) -> Work:
    """Returns the work of both passes: uint8 pixels, prediction and int64 index read, the gradient written once."""
    return Work(B * M * (P * (1 + 2 * element_size) + 8), 0.0)


def head_workloads(device: torch.device) -> Iterator[Workload]:
    """Yields workloads of the caption head, without padding."""
    sizes = SIZES[device.type]
    N, V, D = sizes.head
    hidden = torch.randn(N, D, device=device, dtype=sizes.dtype, requires_grad=True)
    weight = (torch.randn(V, D, device=device) * D**-0.5).to(sizes.dtype).requires_grad_()
    target = torch.randint(PAD + 1, V, (N,), device=device)
    contenders = {
        "triton": partial(_head, backend="triton"),
        "chunked": partial(_head, backend="chunked"),
        "reference": partial(_head, backend="reference"),
        "F.linear_cross_entropy": _torch_head,
        "Liger": _liger_head,
        "cut-cross-entropy": _cut_head,
    }
    work = {"both": head_work(N, V, D, hidden.element_size())}
    contenders = _with_compiled(contenders, device)
    yield Workload("linear_cross_entropy", f"N={N} V={V} D={D}", (hidden, weight, target), contenders, work)


def _head(hidden: Tensor, weight: Tensor, target: Tensor, *, backend: str) -> Tensor:
    return linear_cross_entropy.linear_cross_entropy(hidden, weight, target, ignore_index=PAD, backend=backend)[0]


def _torch_head(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"PyTorch {torch.__version__} has none")
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, target, ignore_index=PAD, options=options)


def _liger_head(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=PAD)(weight, hidden, target)


def _cut_head(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    return cut_cross_entropy(hidden, weight, target, ignore_index=PAD)


def head_work(N: int, V: int, D: int, element_size: int) -> Work:
    """Returns the work forward and backward: three products; hidden states and weight read, their gradients written."""
    return Work(2 * (N + V) * D * element_size + 8 * N, 6.0 * N * V * D)


def attention_workloads(device: torch.device) -> Iterator[Workload]:
    """Yields all backends of `attention`, at the calls of the model, laid out as projections make them."""
    for B, call in SIZES[device.type].attention:
        yield (_packed_workload if call.packed else _dense_workload)(B, call, device)


def _dense_workload(B: int, call: Call, device: torch.device) -> Workload:
    N, _, H, D = call[:4]
    qkv = _random(device, B, N, 3, H, D)
    contenders = _backends(attention.attention_qkv, causal=call.causal)
    if D == 64 and N in COMPILED:
        contenders = _with_compiled(contenders, device)
    work = attention_work((B, N, N, H, D), call.causal, qkv.element_size())
    return Workload("attention", _shape(B, call), (qkv,), contenders, work, _kind(call))


def _packed_workload(B: int, call: Call, device: torch.device) -> Workload:
    """Returns a workload of captions of 2 to Nq tokens, to themselves or to images of Nk tokens each."""
    Nq, Nk, H, D = call[:4]
    lengths = torch.randint(2, Nq + 1, (B,), device=device)
    starts = F.pad(lengths.cumsum(0), (1, 0)).int()
    rows = int(starts[-1])
    if Nq == Nk:
        inputs, keys, pairs = (_random(device, rows, 3, H, D),), rows, lengths.square().sum()
        options = {"causal": call.causal, "cu_seqlens": starts, "max_seqlen": Nq}
        contenders = _backends(attention.attention_qkv, **options)
    else:
        keys, pairs = B * Nk, Nk * rows
        inputs = _random(device, rows, H, D), _random(device, keys, 2, H, D)
        image_starts = Nk * torch.arange(B + 1, device=device, dtype=torch.int32)
        options = {"cu_seqlens_q": starts, "cu_seqlens_k": image_starts, "max_seqlen_q": Nq, "max_seqlen_k": Nk}
        contenders = _backends(attention.attention_kv, **options)
    work = attention_work((1, rows, keys, H, D), call.causal, inputs[0].element_size(), float(pairs))
    return Workload("attention", f"{_shape(B, call)} packed", inputs, contenders, work, _kind(call))


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=SIZES[device.type].dtype, requires_grad=True)


def _backends(function: Callable, **options: object) -> dict[str, Callable]:
    names = [name for name in attention.BACKENDS if name != "auto"]
    return {name: partial(function, backend=name, **options) for name in names}


def _shape(B: int, call: Call) -> str:
    length = f"N={call.queries}" if call.queries == call.keys else f"N={call.queries}->{call.keys}"
    return f"B={B} {length} H={call.heads} D={call.head_dim}{' causal' if call.causal else ''}"


def _kind(call: Call) -> dict[str, object]:
    """Returns the fields of an attention_table.Key."""
    names = {"head_dim": call.head_dim, "queries": call.queries, "keys": call.keys}
    return {**names, "causal": call.causal, "varlen": call.packed}


def attention_work(
    shape: tuple[int, int, int, int, int], causal: bool, element_size: int, pairs: float | None = None
) -> dict[str, Work]:
    """Returns the work by pass, for (B, Nq, Nk, H, D); causal counts half. `pairs`: of query and key, or B·Nq·Nk.

    Forward: two products; reads q, k, v, writes the output. Backward: five, as it cannot keep the weights; reads q,
    k, v, output and its gradient, writes three gradients.
    """
    B, Nq, Nk, H, D = shape
    pairs = B * Nq * Nk if pairs is None else pairs
    product = 2.0 * pairs * H * D * (0.5 if causal else 1.0)
    queries, keys = B * Nq * H * D * element_size, B * Nk * H * D * element_size
    forward = Work(2 * queries + 2 * keys, 2 * product)
    backward = Work(4 * queries + 4 * keys, 5 * product)
    both = Work(forward.bytes + backward.bytes, forward.flops + backward.flops)
    return {"forward": forward, "backward": backward, "both": both}


def _with_compiled(contenders: dict[str, Callable], device: torch.device) -> dict[str, Callable]:
    """Adds the reference under torch.compile on a GPU: a CPU may lack a compiler. Compiled at the call."""
    if device.type != "cuda":
        return contenders

    @functools.cache
    def compiled() -> Callable:
        torch._dynamo.reset()
        return torch.compile(contenders["reference"], dynamic=False)

    return {**contenders, "torch.compile": lambda *inputs: compiled()(*inputs)}


OPS: dict[str, Callable[[torch.device], Iterator[Workload]]] = {
    "masked_patch_loss": patch_workloads,
    "linear_cross_entropy": head_workloads,
    "attention": attention_workloads,
}
