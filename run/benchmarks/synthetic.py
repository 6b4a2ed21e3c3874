"""Batches for benchmarks: random pixels and words, of the sizes that training has."""

import torch

from mug.model.mug import Batch
from mug.model.presets import ModelConfig, Vocabulary

VOCABULARY = Vocabulary(30522, pad=0, bos=1, eos=2, mask=3)  # as large as BERT's
WEIGHTS = {"pixels": 1.0, "caption": 0.1}


def synthetic_batch(config: ModelConfig, vocabulary: Vocabulary, size: int, seed: int = 0) -> Batch:
    """Random pixels, and captions that fill half of the text and one token more."""
    generator = torch.Generator().manual_seed(seed)
    side, length = config.image_size, config.text_length
    tokens = torch.randint(4, vocabulary.size, (size, length), generator=generator)
    tokens[:, 0] = vocabulary.bos
    tokens[:, length // 2] = vocabulary.eos
    tokens[:, length // 2 + 1 :] = vocabulary.pad
    image = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    return {"image": image, "tokens": tokens, "position": torch.arange(size) + seed * size}
