"""From a model and images to rows of a picture."""

import torch
from torch import Tensor

from mug.data.tokenizer import Tokenizer
from mug.model.generate import beam_search, greedy, reconstruct
from mug.model.mug import MUG
from mug.run.training.pictures import Sample


@torch.inference_mode()
def show(
    model: MUG, tokenizer: Tokenizer, image_BCHW: Tensor, position_B: Tensor, beams: int = 1
) -> tuple[list[str], Tensor, Tensor]:
    """(captions, masked, reconstruction) of uint8 images [B, 3, H, W]; captions are of the whole image.

    Without an autoregressive text decoder, the captions are empty.
    """
    model.eval()
    masked, painted = reconstruct(model, image_BCHW, position_B)
    if model.config.captioning != "autoregressive":
        return [""] * len(image_BCHW), masked, painted
    memory_BLD = model.encoder(image_BCHW)
    tokens_BT = greedy(model, memory_BLD) if beams == 1 else beam_search(model, memory_BLD, beams)
    return [tokenizer.decode(row) for row in tokens_BT[:, 1:].tolist()], masked, painted


def rows(
    model: MUG, tokenizer: Tokenizer, batch: dict[str, Tensor], true: list[str | None], beams: int = 1
) -> list[Sample]:
    """The rows of a picture for a batch of `image` and `position`."""
    written, masked, painted = show(model, tokenizer, batch["image"], batch["position"], beams)
    return [Sample(*row) for row in zip(batch["image"], masked, painted, written, true, strict=True)]
