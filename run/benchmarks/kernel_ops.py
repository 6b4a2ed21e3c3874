"""What the kernel benchmark times: each op's shapes, its contenders, and the least work that it has to do.

Dimension letters: B batch, M masked patches, P values of a patch, N tokens (Nq queries, Nk keys), V vocabulary,
H heads, D width of a token or of a head.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mug.kernels import attention, linear_cross_entropy, masked_patch_loss
from mug.model.encoder import PIXEL_MEAN, PIXEL_STD
from mug.run.benchmarks.kernel_timing import Work, Workload

OURS = {"masked_patch_loss": ("triton",), "linear_cross_entropy": ("triton", "chunked"), "attention": ("triton",)}
IMAGE_SIDE, MASK_RATIO = 224, 0.75
COMPILED = (50, 197)  # tokens at which attention is timed under torch.compile too, as each takes seconds to compile
PAD = 0  # no target is: every row counts


@dataclass(frozen=True)
class Sizes:
    """dtype of floating inputs; B of the masked-patch loss; (N, V, D) of the head; (B, Nq, Nk, H, D, causal) dense
    and packed, where sequences of Nq have 2 to Nq queries."""

    dtype: torch.dtype
    images: int
    head: tuple[int, int, int]
    attention: tuple[tuple[int, int, int, int, int, bool], ...]
    packed: tuple[tuple[int, int, int, int, int, bool], ...]


HEADS = {32: 16, 64: 12, 80: 16, 88: 16}  # by head width: pixel decoder, ViT-B, ViT-H, ViT-g
SIZES = {
    "cuda": Sizes(
        torch.bfloat16,
        images=256,
        head=(16384, 30522, 768),
        attention=(
            *((256, N, N, H, D, False) for N in (50, 64, 197, 257) for D, H in HEADS.items()),
            *((64, 577, 577, H, D, False) for D, H in HEADS.items()),  # the reference holds all scores in fp32
            (256, 64, 64, 12, 64, True),
            (256, 64, 50, 12, 64, False),
        ),
        packed=((256, 64, 64, 12, 64, True), (256, 64, 50, 12, 64, False), (256, 64, 65, 12, 64, False)),
    ),
    "cpu": Sizes(
        torch.float32,
        images=8,
        head=(512, 4096, 192),
        attention=(
            (4, 50, 50, 12, 64, False),
            (4, 197, 197, 16, 32, False),
            (4, 64, 64, 12, 64, True),
            (4, 64, 50, 12, 64, False),
        ),
        packed=((4, 64, 64, 12, 64, True), (4, 64, 50, 12, 64, False)),
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
    """The loss as it is first written down: normalise all pixels, cut all patches, normalise all, pick the masked."""
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
    """Forward and backward: uint8 pixels, prediction and int64 index read once, the gradient written once."""
    return Work(B * M * (P * (1 + 2 * element_size) + 8), 0.0)


def head_workloads(device: torch.device) -> Iterator[Workload]:
    """The caption head, without padding."""
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
    """Forward and backward: three products; hidden states and weight read, their gradients written."""
    return Work(2 * (N + V) * D * element_size + 8 * N, 6.0 * N * V * D)


def attention_workloads(device: torch.device) -> Iterator[Workload]:
    """Whatever backends `attention` has, at the lengths of encoder, pixel decoder and text decoder."""
    dtype = SIZES[device.type].dtype
    for B, Nq, Nk, H, D, causal in SIZES[device.type].attention:
        q, k, v = (torch.randn(B, N, H, D, device=device, dtype=dtype, requires_grad=True) for N in (Nq, Nk, Nk))
        contenders = _backends(causal=causal)
        if D == 64 and Nq == Nk and Nq in COMPILED:
            contenders = _with_compiled(contenders, device)
        work = attention_work((B, Nq, Nk, H, D), causal, q.element_size())
        kind = _kind(D, Nq, Nk, causal, varlen=False)
        yield Workload("attention", _shape(B, Nq, Nk, H, D, causal), (q, k, v), contenders, work, kind)
    for sizes in SIZES[device.type].packed:
        yield _packed_workload(*sizes, device)


def _packed_workload(B: int, Nq: int, Nk: int, H: int, D: int, causal: bool, device: torch.device) -> Workload:
    """Captions of 2 to Nq tokens, to themselves where causal, else to images of Nk tokens each."""
    lengths = torch.randint(2, Nq + 1, (B,), device=device)
    starts_q = F.pad(lengths.cumsum(0), (1, 0)).int()
    starts_k = starts_q if causal else Nk * torch.arange(B + 1, device=device, dtype=torch.int32)
    rows = [int(starts[-1]) for starts in (starts_q, starts_k, starts_k)]
    dtype = SIZES[device.type].dtype
    q, k, v = (torch.randn(n, H, D, device=device, dtype=dtype, requires_grad=True) for n in rows)
    options = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "max_seqlen": max(Nq, Nk)}
    pairs = float((lengths * (lengths if causal else Nk)).sum())
    work = attention_work((1, rows[0], rows[1], H, D), causal, q.element_size(), pairs)
    shape = f"{_shape(B, Nq, Nk, H, D, causal)} packed"
    kind = _kind(D, Nq, Nk, causal, varlen=True)
    return Workload("attention", shape, (q, k, v), _backends(causal=causal, **options), work, kind)


def _backends(**options: object) -> dict[str, Callable]:
    names = [name for name in attention.BACKENDS if name != "auto"]
    return {name: partial(attention.attention, backend=name, **options) for name in names}


def _shape(B: int, Nq: int, Nk: int, H: int, D: int, causal: bool) -> str:
    length = f"N={Nq}" if Nq == Nk else f"N={Nq}->{Nk}"
    return f"B={B} {length} H={H} D={D}{' causal' if causal else ''}"


def _kind(D: int, Nq: int, Nk: int, causal: bool, varlen: bool) -> dict[str, object]:
    return {"head_dim": D, "tokens": max(Nq, Nk), "causal": causal, "varlen": varlen}


def attention_work(
    shape: tuple[int, int, int, int, int], causal: bool, element_size: int, pairs: float | None = None
) -> dict[str, Work]:
    """By pass, for (B, Nq, Nk, H, D); causal attention counts as half. `pairs`: of query and key, B·Nq·Nk if None.

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
    """With the reference under torch.compile, on a GPU: a CPU has no compiler for sure."""
    if device.type != "cuda":
        return contenders
    torch._dynamo.reset()
    return {**contenders, "torch.compile": torch.compile(contenders["reference"], dynamic=False)}


OPS: dict[str, Callable[[torch.device], Iterator[Workload]]] = {
    "masked_patch_loss": patch_workloads,
    "linear_cross_entropy": head_workloads,
    "attention": attention_workloads,
}
