"""A trained model: what its encoder makes of images, and the captions and reconstructions of its decoders.

Dimension letters: B batch, C captions, D width.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mug.api.images import ImageLike, squares
from mug.data.captions import clean
from mug.data.tokenizer import Tokenizer
from mug.model.encoder import Encoder
from mug.model.objectives.objective import Captions, EmbedsPairs, Objective, Reconstructs, name_of
from mug.run.cluster import hardware
from mug.run.common.errors import RunError
from mug.run.evaluators.features import EncoderFeatures
from mug.run.reporting.grid import to_image
from mug.run.state.foreign_weights import described_encoder, is_pretrained
from mug.run.state.initial import initial_encoder
from mug.run.state.restore import restore

BATCH = 64  # images at once

log = logging.getLogger("mug")


@dataclass(frozen=True)
class Model:
    """A trained model in eval mode, fp32, on the GPU if there is one; made by `load`.

    Images are paths, PIL images or uint8 arrays [H, W, 3]; any size, any number, taken as central squares, as the
    evaluations take them.

    encoder: of vision. image_size: the side of its input. objective: all of the model; None where only an encoder was
    exported. tokenizer: of its captions, where it learned from some.
    """

    encoder: Encoder
    image_size: int
    objective: Objective | None = None
    tokenizer: Tokenizer | None = None

    @torch.inference_mode()
    def embed(self, images: Iterable[ImageLike]) -> Tensor:
        """Returns fp32 [B, D] on the CPU: the encoder's class token of each image, nothing masked.

        Raises:
            DataError: an image cannot be read; it is named.
        """
        features = EncoderFeatures(self.encoder, self.image_size)
        parts = [features(image_BCHW)["class token"].float().cpu() for image_BCHW in self._batches(images)]
        return torch.cat(parts) if parts else torch.empty(0, self.encoder.cls_token.shape[-1])

    @torch.inference_mode()
    def caption(self, images: Iterable[ImageLike], beams: int = 1) -> list[str]:
        """Returns a caption of each image, written greedily, or by beam search with more than one beam.

        Raises:
            RunError, ObjectiveError: this model does not write captions.
            DataError: an image cannot be read; it is named.
        """
        if beams < 1:
            raise RunError(f"beams must be at least 1, not {beams}")
        objective = self._able(Captions, "write captions")
        objective.check_captions()
        assert self.tokenizer is not None  # an objective that writes captions was trained with one
        tokens = (row for batch in self._batches(images) for row in objective.caption(batch, beams)[:, 1:].tolist())
        return [self.tokenizer.decode(row) for row in tokens]

    @torch.inference_mode()
    def reconstruct(self, images: Iterable[ImageLike]) -> list[tuple[Image.Image, Image.Image]]:
        """Returns (what the encoder sees, the reconstruction) of each image; its place in `images` decides the mask.

        Raises:
            RunError: this model does not reconstruct images.
            DataError: an image cannot be read; it is named.
        """
        objective, pictures = self._able(Reconstructs, "reconstruct images"), []
        for image_BCHW in self._batches(images):
            position_B = len(pictures) + torch.arange(len(image_BCHW), device=image_BCHW.device)
            both = objective.reconstruct(image_BCHW, position_B)
            pictures += [(to_image(masked), to_image(painted)) for masked, painted in zip(*both, strict=True)]
        return pictures

    @torch.inference_mode()
    def similarity(self, images: Iterable[ImageLike], captions: Iterable[str]) -> Tensor:
        """Returns fp32 [B, C] on the CPU: the cosine of each image with each caption in their joint space.

        Raises:
            RunError: this model has no such space.
            DataError: an image cannot be read; it is named.
        """
        objective = self._able(EmbedsPairs, "embed captions")
        assert self.tokenizer is not None
        length = objective.config.text_length
        tokens_CT = torch.from_numpy(np.stack([self.tokenizer.encode(clean(text), length) for text in captions]))
        text_CE = objective.embed_text(tokens_CT.to(hardware.device()))
        rows = [objective.embed_image(image_BCHW) @ text_CE.T for image_BCHW in self._batches(images)]
        return torch.cat(rows).cpu()

    def _batches(self, images: Iterable[ImageLike]) -> Iterator[Tensor]:
        one = isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
        if one:  # the rows of an array would be read as images
            raise RunError("give a list of images, not one")
        for image_BCHW in squares(images, self.image_size, BATCH):
            yield image_BCHW.to(hardware.device())

    def _able(self, ability: type, what: str) -> Any:
        if isinstance(self.objective, ability):
            return self.objective
        if self.objective is None:
            raise RunError(f"an export holds the encoder alone and cannot {what}; load the run that it comes from")
        raise RunError(f"objective {name_of(type(self.objective))} cannot {what}; load a run of another objective")


def load(path: str | Path) -> Model:
    """Returns the model of a run's folder (its newest intact checkpoint), of a checkpoint-STEP folder, or the encoder
    of a folder that run/export.py wrote in the format timm, transformers or vitmae.

    Raises:
        RunError: there is none, or it is damaged; or an export that another library has to run.
    """
    path = Path(path)
    if (path / "model.onnx").is_file():
        raise RunError(f"{path} is an ONNX export: ONNX Runtime runs it; load the run, or export it with --format timm")
    if is_pretrained(path):
        config = described_encoder(path)
        encoder = initial_encoder(config, str(path), log.warning).to(hardware.device()).eval()
        return Model(encoder, config.image_size)
    objective, tokenizer, _ = restore(path, log.warning)
    return Model(objective.encoder, objective.config.image_size, objective, tokenizer)
