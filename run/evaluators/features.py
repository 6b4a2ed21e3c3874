"""Computes the features of a frozen encoder, and caches them on disk.

Dimension letters: B batch, N images, D width, S image side.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mug.data.kinds.labelled import CentralSquares
from mug.data.labelled_sources import Source
from mug.data.loader import load
from mug.model.encoder import Encoder
from mug.model.objectives.objective import Objective
from mug.run.cluster import hardware
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import EvalContext
from mug.run.evaluators.sharing import broadcast_rows, gather_rows, share

PIXELS_SIDE = 32  # of the images whose pixels are a baseline
VIEW = "centre square, bicubic, 1"  # raise the number whenever Source.view changes

Features = dict[str, Tensor]  # kind of feature → fp32 [N, D]


class EncoderFeatures(nn.Module):
    """The class token, and the mean of the patch tokens, of full images (nothing masked)."""

    def __init__(self, encoder: Encoder, size: int):
        super().__init__()
        self.encoder, self.size = encoder, size

    def forward(self, image_B3SS: Tensor) -> Features:
        tokens_BLD = self.encoder(image_B3SS)
        return {"class token": tokens_BLD[:, 0], "mean of patches": tokens_BLD[:, 1:].mean(1)}

    def key(self) -> str:
        """Returns the SHA-256 of the weights, and of the number of heads, which no weight's shape shows."""
        digest = hashlib.sha256(f"{self.encoder.blocks[0].attn.num_heads} heads".encode())
        for name, value in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


class PixelFeatures(nn.Module):
    """A baseline: the pixels of the image, downscaled."""

    size = PIXELS_SIDE

    def forward(self, image_B3SS: Tensor) -> Features:
        return {"pixels": image_B3SS.flatten(1).float() / 255}

    def key(self) -> str:
        return "pixels"


def principal_components(train: Features, test: Features, count: int) -> tuple[Features, Features]:
    """A baseline: pixels along the `count` directions in which those of the training images vary most."""
    train_ND, test_MD = (features["pixels"].double() for features in (train, test))
    mean_D = train_ND.mean(0)
    covariance_DD = (train_ND - mean_D).T @ (train_ND - mean_D)
    directions_DK = torch.linalg.eigh(covariance_DD).eigenvectors[:, -count:].flip(1)
    train_NK, test_MK = (((of - mean_D) @ directions_DK).float() for of in (train_ND, test_MD))
    return {"components": train_NK}, {"components": test_MK}


def untrained_encoder(objective: Objective, seed: int) -> Encoder:
    """A baseline: the encoder before any training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(objective)(objective.config, objective.context).encoder.eval()


@contextlib.contextmanager
def fast_products(device: torch.device | str) -> Iterator[None]:
    """Compute fp32 products in TF32 on a GPU, several times as fast; on a CPU nothing changes.

    TF32 keeps 11 significant bits: with operands so rounded, features of ViT-B moved by 2e-3 to 5e-3 of their norm on
    a CPU, and under bf16 autocast ten times as far.
    """
    before = torch.get_float32_matmul_precision()
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.inference_mode()
def extract(
    network: nn.Module,
    source: Source,
    batch: int,
    workers: int,
    device: torch.device | str,
    progress: Callable[[str], None] = lambda _: None,
) -> Features:
    """Returns the features of all images, on the CPU.

    Raises:
        DataError: an image cannot be decoded.
        RunError: a feature is not finite.
    """
    network = network.to(device).eval()
    parts: dict[str, list[Tensor]] = {}
    batches = [range(i, min(i + batch, len(source))) for i in range(0, len(source), batch)]
    with fast_products(device):
        for numbers, (loaded, _) in zip(
            batches, load(CentralSquares(source, network.size), batches, workers), strict=True
        ):
            progress(f"encoding image {numbers[0]:,} of {len(source):,}")
            for name, value in network(loaded["image"].to(device, non_blocking=True)).items():
                parts.setdefault(name, []).append(value.float().cpu())
    features = {name: torch.cat(parts.pop(name)) for name in list(parts)}  # no two copies of all of them at once
    for name, value in features.items():
        broken = (~value.isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            raise RunError(
                f"the {name} of {len(broken)} of {len(value)} images is not finite, {source.images.name(broken[0])} the"
                " first; the weights are broken: use an earlier checkpoint"
            )
    return features


def extract_shared(network: nn.Module, source: Source, context: EvalContext) -> Features:
    """Returns the features of all images, on each rank's CPU; the ranks share the work. A collective call."""
    mine = source.select([*share(len(source))] or [0])
    features = extract(network, mine, context.micro_batch, context.workers, hardware.device(), context.progress)
    return {name: gather_rows(value, len(source)) for name, value in features.items()}


def features_of(network: nn.Module, source: Source, context: EvalContext) -> Features:
    """Returns `extract_shared`, from the context's folder of features if cached there; a collective call."""
    if context.features is None:
        return extract_shared(network, source, context)
    key = f"{network.key()} {source.stamp or source.fingerprint} {network.size} {VIEW}"
    return cached_features(context.features, key, lambda: extract_shared(network, source, context))


def cached_features(folder: Path, key: str, make: Callable[[], Features]) -> Features:
    """Returns the result of `make`, from `folder` if it is intact there; rank 0 reads and writes. A collective call.

    Args:
        key: names encoder, images and view.

    Raises:
        RunError: the folder cannot be written; raised before `make` is called, which may take hours.
    """
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    partial = path.with_suffix(f".{os.getpid()}.partial")
    kept: Features = {}

    def read() -> dict[str, tuple[int, ...]]:
        if path.is_file():
            with contextlib.suppress(SafetensorError):
                kept.update(load_file(path))
        if not kept:
            with _keeping_in(folder):
                folder.mkdir(parents=True, exist_ok=True)
                partial.touch()
                partial.unlink()
        return {name: tuple(value.shape) for name, value in kept.items()}

    def write() -> None:
        try:
            with _keeping_in(folder):
                save_file(features, partial, {"key": key})
                partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)

    if shapes := hardware.on_rank_zero(read):
        return {name: broadcast_rows(kept.get(name), shape) for name, shape in shapes.items()}
    features = make()
    hardware.on_rank_zero(write)
    return features


@contextlib.contextmanager
def _keeping_in(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write features to {folder} ({error}): choose another --cache") from None
