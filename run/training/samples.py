"""From a model and images to the rows of a picture."""

import torch
from torch import Tensor

from mug.data.tokenizer import Tokenizer
from mug.model.generate import beam_search, greedy, reconstruct
from mug.model.mug import MUG
from mug.run.training.pictures import Sample


@torch.inference_mode()
def rows(
    model: MUG, tokenizer: Tokenizer, image_BCHW: Tensor, position_B: Tensor, true: list[str], beams: int = 1
) -> list[Sample]:
    """Reconstructions and captions of uint8 images [B, 3, H, W]; `position_B` decides the masks.

    Captions are written from the whole image: greedily, and with more than one beam also by beam search. A model
    whose text decoder is not autoregressive, or was not trained, writes none; one whose pixel decoder was not trained
    leaves the masked patches as they are. An empty string in `true` is left out.
    """
    model.eval()
    masked, painted = reconstruct(model, image_BCHW, position_B)
    if "pixels" not in model.terms:
        painted = masked
    written: dict[str, list[str]] = {}
    if model.config.captioning == "autoregressive" and "caption" in model.terms:
        memory_BLD = model.encoder(image_BCHW)
        written["written"] = _decode(tokenizer, greedy(model, memory_BLD))
        if beams > 1:
            written[f"written, {beams} beams"] = _decode(tokenizer, beam_search(model, memory_BLD, beams))
    if any(true):
        written["true"] = true
    captions = [{author: texts[i] for author, texts in written.items()} for i in range(len(image_BCHW))]
    return [Sample(*row) for row in zip(image_BCHW, masked, painted, captions, strict=True)]


def _decode(tokenizer: Tokenizer, tokens_BT: Tensor) -> list[str]:
    return [tokenizer.decode(row) for row in tokens_BT[:, 1:].tolist()]
