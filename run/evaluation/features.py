"""From images to the features of a frozen encoder, kept on disk.

Dimension letters: B batch, N images, D width, S image side.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mug.data.ledger import Replaced
from mug.data.loader import load
from mug.model.encoder import Encoder
from mug.model.presets import ModelConfig
from mug.model.vit import init_weights
from mug.run.evaluation.datasets import Source
from mug.run.training.errors import RunError

PIXELS_SIDE = 32  # of the images whose pixels are a baseline
VIEW = "centre square, bicubic, 1"  # raise the number whenever Source.view changes

Features = dict[str, Tensor]  # kind of feature → fp32 [N, D]


class EncoderFeatures(nn.Module):
    """The class token, and the mean of the patch tokens, of whole images (nothing masked)."""

    def __init__(self, encoder: Encoder, size: int):
        super().__init__()
        self.encoder, self.size = encoder, size

    def forward(self, image_B3SS: Tensor) -> Features:
        tokens_BLD = self.encoder(image_B3SS)
        return {"class token": tokens_BLD[:, 0], "mean of patches": tokens_BLD[:, 1:].mean(1)}

    def key(self) -> str:
        """SHA-256 of the weights, and of the number of heads, which no weight's shape tells."""
        digest = hashlib.sha256(f"{self.encoder.blocks[0].attn.num_heads} heads".encode())
        for name, value in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


class PixelFeatures(nn.Module):
    """A floor: the pixels of the image, made small."""

    size = PIXELS_SIDE

    def forward(self, image_B3SS: Tensor) -> Features:
        return {"pixels": image_B3SS.flatten(1).float() / 255}

    def key(self) -> str:
        return "pixels"


def random_encoder(config: ModelConfig, seed: int) -> Encoder:
    """A floor: the encoder as it was before any training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Encoder(config).apply(init_weights).eval()


@dataclass(frozen=True)
class _Views:
    """What mug.data.loader reads batches of: here a position is an image's number."""

    source: Source
    size: int

    def batch(self, positions: Sequence[int]) -> tuple[dict[str, Tensor], list[Replaced]]:
        """`image` uint8 [B, 3, S, S]; none stands in for another."""
        views = [self.source.view(number, self.size) for number in positions]
        return {"image": torch.from_numpy(np.stack(views))}, []


@torch.inference_mode()
def extract(network: nn.Module, source: Source, batch: int, workers: int, device: torch.device | str) -> Features:
    """The features of all images, on the CPU.

    Raises:
        DataError: an image cannot be decoded.
        RunError: a feature is not finite.
    """
    network = network.to(device).eval()
    parts: dict[str, list[Tensor]] = {}
    batches = [range(i, min(i + batch, len(source))) for i in range(0, len(source), batch)]
    for loaded, _ in load(_Views(source, network.size), batches, workers):
        for name, value in network(loaded["image"].to(device, non_blocking=True)).items():
            parts.setdefault(name, []).append(value.float().cpu())
    features = {name: torch.cat(parts.pop(name)) for name in list(parts)}  # no two copies of all of them at once
    for name, value in features.items():
        broken = (~value.isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            raise RunError(
                f"the {name} of {len(broken)} of {len(value)} images is not finite, {source.images.name(broken[0])} the"
                " first; the weights are broken: take an earlier checkpoint"
            )
    return features


def cached_features(folder: Path, key: str, make: Callable[[], Features]) -> Features:
    """What `make` gives, from `folder` if it was made before and is whole.

    Args:
        key: names encoder, images and view.

    Raises:
        RunError: the folder cannot be written; said before anything is made, which may take hours.
    """
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    if path.is_file():
        with contextlib.suppress(SafetensorError):
            return load_file(path)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with _keeping_in(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial.touch()
    try:
        features = make()
        with _keeping_in(folder):
            save_file(features, partial, {"key": key})
            partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return features


@contextlib.contextmanager
def _keeping_in(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"features cannot be kept in {folder} ({error}): name another --cache") from None
