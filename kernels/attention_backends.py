"""The backends of attention, by name: what hinders each, and how it is called.

Dimension letters: B batch or packed sequences, N tokens (Nq queries, Nk keys), T tokens of all sequences, H heads,
D head dimension. A name without letters may be dense, [B, N, H, D], or packed, [T, H, D].
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mug.kernels.attention_op import apart, triton_attention
from mug.kernels.attention_table import architecture
from mug.kernels.errors import BackendError

HALVES = (torch.float16, torch.bfloat16)
MAX_D = {"triton": 128, "flash_attn": 256, "flash_attn_4": 128}


class Masks(NamedTuple):
    """The masks, as in `attention`; longest_q and longest_k: no sequence has more queries or keys."""

    causal: bool
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    longest_q: int
    longest_k: int
    kv_lengths: Tensor | None
    scale: float

    @property
    def starts(self) -> tuple[Tensor, Tensor]:
        """cu_seqlens_q and cu_seqlens_k, of packed sequences."""
        assert self.cu_seqlens_q is not None and self.cu_seqlens_k is not None
        return self.cu_seqlens_q, self.cu_seqlens_k


def constant_when_compiled(function: Callable) -> Callable:
    """Mark a function that torch.compile calls while it compiles, and whose result it takes for a constant.

    As torch.compiler.assume_constant_result, which also imports the compiler: seconds of every process.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def obstacle(backend: str, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> str | None:
    """Returns why the backend cannot serve this call, naming the argument; None if it can, as far as is known."""
    if backend in ("reference", "sdpa", "sdpa_math"):
        return None
    if backend.startswith("sdpa"):
        return _sdpa_obstacle(backend, q, masks)
    if not installed(backend):
        return f"{'triton' if backend == 'triton' else backend.replace('_', '-')} is not installed"
    others = {"k": k, "v": v, **masks._asdict()}
    strangers = [name for name, x in others.items() if isinstance(x, Tensor) and x.device != q.device]
    if strangers:
        return f"{strangers[0]} and q are on different devices"
    if not q.dtype == k.dtype == v.dtype:
        return f"q is {q.dtype}, k {k.dtype}, v {v.dtype}"
    if q.shape[-1] > MAX_D[backend]:
        return f"q has head dimension {q.shape[-1]}; max is {MAX_D[backend]}"
    if not (q.numel() and k.numel()):
        return f"{'k' if q.numel() else 'q'} is empty"
    return _triton_obstacle(q, masks) if backend == "triton" else _flash_obstacle(q, masks)


def _sdpa_obstacle(backend: str, q: Tensor, masks: Masks) -> str | None:
    if q.is_cpu or backend != "sdpa_flash":
        return "q is on cpu" if q.is_cpu and backend != "sdpa_flash" else None
    if masks.kv_lengths is not None:
        return "kv_lengths needs a mask, which PyTorch's flash kernel lacks"
    if masks.cu_seqlens_q is None:
        return None
    if not installed("varlen_attn"):
        return f"cu_seqlens_q needs varlen_attn, which PyTorch {torch.__version__} lacks"
    if q.dtype not in HALVES:
        return f"q is {q.dtype}, not float16 or bfloat16"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"q has head dimension {q.shape[-1]}; varlen_attn takes multiples of 8 up to 256"
    if not q.numel():
        return "q is empty"
    if not masks.scale > 0:
        return f"scale is {masks.scale}, but varlen_attn needs more than 0"
    return "its device lacks varlen_attn, which needs sm_80" if _before_ampere(str(q.device)) else None


@constant_when_compiled
def _before_ampere(device: str) -> bool:
    return int(architecture(device).removeprefix("sm_")) < 80


def _triton_obstacle(q: Tensor, masks: Masks) -> str | None:
    if q.dtype not in (torch.float32, *HALVES):
        return f"q is {q.dtype}"
    if masks.kv_lengths is not None and masks.kv_lengths.dtype not in (torch.int32, torch.int64):
        return f"kv_lengths is {masks.kv_lengths.dtype}, not int32 or int64"
    if q.device.type == "cuda":
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"q is on {q.device.type}, which needs TRITON_INTERPRET=1"
    return "q is torch.bfloat16, which Triton's interpreter rounds wrongly" if q.dtype == torch.bfloat16 else None


def _flash_obstacle(q: Tensor, masks: Masks) -> str | None:
    if q.device.type != "cuda":
        return f"q is on {q.device.type}"
    if q.dtype not in HALVES:
        return f"q is {q.dtype}, not float16 or bfloat16"
    return "kv_lengths: it does not support padding; pack with cu_seqlens" if masks.kv_lengths is not None else None


@constant_when_compiled
def installed(backend: str) -> bool:
    """Whether what is behind a backend, or PyTorch's varlen_attn, can be imported; "flash_attn" is version 3 or 2."""
    modules = {
        "triton": ["triton"],
        "varlen_attn": ["torch.nn.attention.varlen"],
        "flash_attn_3": ["flash_attn_interface"],
        "flash_attn": ["flash_attn_interface", "flash_attn.flash_attn_interface"],
        "flash_attn_4": ["flash_attn.cute"],
    }
    return any(_exists(module) for module in modules[backend])


@functools.cache
def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would lie in
        return False


def reference(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
    """Matmul and softmax, at least in fp32."""
    if masks.cu_seqlens_q is not None:
        return _padded(reference, q, k, v, masks)
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores_BHNN = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide)) * masks.scale
        hidden = torch.zeros_like(scores_BHNN, dtype=torch.bool)
        if masks.causal:
            hidden = hidden | torch.ones_like(hidden[0, 0]).triu(1)
        if masks.kv_lengths is not None:
            hidden = hidden | ~_real_keys(masks.kv_lengths, k.shape[1])
        # exp(-inf - -inf) is NaN: a row without keys takes finite scores, then zero weights.
        scores_BHNN = scores_BHNN.masked_fill(hidden, torch.finfo(scores_BHNN.dtype).min)
        weights_BHNN = scores_BHNN.softmax(-1).masked_fill(hidden, 0.0)
        return torch.einsum("bhqk,bkhd->bqhd", weights_BHNN, v.to(wide)).to(q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
    """PyTorch's scaled_dot_product_attention."""
    if masks.cu_seqlens_q is not None:
        lengths_known = q.is_cpu and not torch.compiler.is_compiling()
        return (_by_length if lengths_known else _padded)(sdpa, q, k, v, masks)
    causal, keep = masks.causal, None
    if masks.kv_lengths is not None:
        keep = _real_keys(masks.kv_lengths, k.shape[1])
        if causal:
            keep = keep & torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
            causal = False
    q_BHND, k_BHND, v_BHND = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out_BHND = F.scaled_dot_product_attention(
        q_BHND, k_BHND, v_BHND, attn_mask=keep, is_causal=causal, scale=masks.scale
    )
    if keep is not None:  # PyTorch's kernels differ on rows without a key
        out_BHND = out_BHND.masked_fill(~keep.any(-1, keepdim=True), 0.0)
    return out_BHND.transpose(1, 2)


def _sdpa_by(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
    try:
        with sdpa_kernel(kernel):
            return sdpa(q, k, v, masks)
    except RuntimeError as error:
        if "available kernel" not in str(error):
            raise
        raise BackendError(
            f'backend="{_SDPA_NAMES[kernel]}" cannot serve this call: PyTorch lacks such a kernel for q'
            f" {tuple(q.shape)}, {q.dtype}, on {q.device}"
        ) from error


def _sdpa_flash(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
    """PyTorch's own FlashAttention; packed sequences on a GPU need no mask there."""
    if masks.cu_seqlens_q is None or q.is_cpu:
        return _sdpa_by(SDPBackend.FLASH_ATTENTION, q, k, v, masks)
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    longest = masks.longest_q, masks.longest_k
    window = (-1, 0 if masks.causal else -1)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # else newer versions may take cuDNN's
        out = varlen_attn(q, k, v, *masks.starts, *longest, scale=masks.scale, window_size=window)
    return out if isinstance(out, Tensor) else out[0]


def _real_keys(kv_lengths: Tensor, Nk: int) -> Tensor:
    """Returns bool [B, 1, 1, Nk], True where the key is not padding."""
    return (torch.arange(Nk, device=kv_lengths.device) < kv_lengths[:, None])[:, None, None]


def _by_length(run, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
    """Packed sequences of equal lengths together, where the host may read the lengths: no padding, and no mask."""
    q_lengths, k_lengths = (starts.diff().tolist() for starts in masks.starts)
    real = k_lengths if masks.kv_lengths is None else map(min, k_lengths, masks.kv_lengths.tolist())
    alike: dict[tuple[int, int, int], list[int]] = {}
    for b, lengths in enumerate(zip(q_lengths, k_lengths, real, strict=True)):
        alike.setdefault(lengths, []).append(b)
    q_B, k_B, v_B = q.split(q_lengths), k.split(k_lengths), v.split(k_lengths)
    dense = masks._replace(cu_seqlens_q=None, cu_seqlens_k=None, kv_lengths=None)
    out_B = list(q_B)
    for (Nq, _, Nk), members in alike.items():
        q_GNHD, k_GNHD, v_GNHD = (torch.stack([x_B[b] for b in members]) for x_B in (q_B, k_B, v_B))
        out_GNHD = run(q_GNHD, k_GNHD[:, :Nk], v_GNHD[:, :Nk], dense) if Nq and Nk else 0 * q_GNHD
        for b, out_NHD in zip(members, out_GNHD.unbind(), strict=True):
            out_B[b] = out_NHD
    return torch.cat(out_B)


def _padded(run, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
    """Packed sequences through a backend that supports only dense ones."""
    q_starts, k_starts = masks.starts
    q_BNHD = _unpack(q, q_starts, masks.longest_q)
    k_BNHD, v_BNHD = (_unpack(x, k_starts, masks.longest_k) for x in (k, v))
    lengths_B = k_starts.diff()
    if masks.kv_lengths is not None:
        lengths_B = lengths_B.minimum(masks.kv_lengths)
    dense = masks._replace(cu_seqlens_q=None, cu_seqlens_k=None, kv_lengths=lengths_B)
    out_BNHD = run(q_BNHD, k_BNHD, v_BNHD, dense)
    row_T = torch.arange(len(q), device=q.device, dtype=torch.int32)
    sequence_T = torch.searchsorted(q_starts[1:].contiguous(), row_T, right=True)
    return out_BNHD[sequence_T, row_T - q_starts[sequence_T]]


def _unpack(x_THD: Tensor, cu_seqlens: Tensor, N: int) -> Tensor:
    """Returns [B, N, H, D]; after the end of a sequence come arbitrary rows."""
    index_BN = cu_seqlens[:-1, None] + torch.arange(N, device=x_THD.device)
    return x_THD[index_BN.clamp(max=len(x_THD) - 1)]


def triton(parts: tuple[Tensor, ...], masks: Masks) -> Tensor:
    """The project's kernels."""
    causal, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, kv_lengths, scale = masks
    return triton_attention(parts, cu_seqlens_q, cu_seqlens_k, kv_lengths, longest_q, longest_k, causal, scale)[0]


def flash_attn(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
    """FlashAttention 3 where it is installed, else 2."""
    if installed("flash_attn_3"):
        import flash_attn_interface as package
    else:
        import flash_attn as package
    return _flash(package, q, k, v, masks)


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
    import flash_attn.cute as package

    return _flash(package, q, k, v, masks)


def _flash(package, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
    settings = {"softmax_scale": masks.scale, "causal": masks.causal}
    settings["deterministic"] = torch.are_deterministic_algorithms_enabled()
    if masks.cu_seqlens_q is None:
        out = package.flash_attn_func(q, k, v, **settings)
    else:
        out = package.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=masks.cu_seqlens_q,
            cu_seqlens_k=masks.cu_seqlens_k,
            max_seqlen_q=masks.longest_q,
            max_seqlen_k=masks.longest_k,
            **settings,
        )
    return out[0] if isinstance(out, tuple) else out  # versions 3 and 4 may add the log-sum-exp


_SDPA_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "sdpa_cudnn",
    SDPBackend.FLASH_ATTENTION: "sdpa_flash",
    SDPBackend.EFFICIENT_ATTENTION: "sdpa_efficient",
    SDPBackend.MATH: "sdpa_math",
}
_LIBRARIES = {
    "sdpa": sdpa,
    **{name: functools.partial(_sdpa_by, kernel) for kernel, name in _SDPA_NAMES.items()},
    "sdpa_flash": _sdpa_flash,
    "flash_attn": flash_attn,
    "flash_attn_4": flash_attn_4,
    "reference": reference,
}


def _run_apart(run: Callable[..., Tensor], parts: tuple[Tensor, ...], masks: Masks) -> Tensor:
    return run(*apart(parts), masks)


# Functions of (parts, masks), where parts are (qkv,), (q, kv) or (q, k, v).
RUN = {"triton": triton, **{name: functools.partial(_run_apart, run) for name, run in _LIBRARIES.items()}}
