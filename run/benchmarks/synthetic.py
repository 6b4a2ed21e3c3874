"""Batches for benchmarks: random pixels and words, of the sizes that training has."""

import torch

from mug.data.kinds.samples import Batch as KindBatch
from mug.model.objectives.mug import MUGConfig
from mug.model.objectives.objective import Batch, Objective
from mug.model.presets import Vocabulary

VOCABULARY = Vocabulary(30522, pad=0, bos=1, eos=2, mask=3)  # as large as BERT's
WEIGHTS = {"pixels": 1.0, "caption": 0.1}


def synthetic_batch(config: MUGConfig, vocabulary: Vocabulary, size: int, seed: int = 0) -> Batch:
    """Returns random pixels, and captions that fill half of the text and one token more."""
    generator = torch.Generator().manual_seed(seed)
    side, length = config.image_size, config.text_length
    tokens = torch.randint(4, vocabulary.size, (size, length), generator=generator)
    tokens[:, 0] = vocabulary.bos
    tokens[:, length // 2] = vocabulary.eos
    tokens[:, length // 2 + 1 :] = vocabulary.pad
    image = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    return {"image": image, "tokens": tokens, "position": torch.arange(size) + seed * size}


def full_batch(objective: Objective, size: int, seed: int = 0) -> Batch:
    """Returns random pixels, in the views that the objective asks for, and captions that fill its text, if it reads
    any."""
    generator = torch.Generator().manual_seed(seed)
    config, vocabulary = objective.config, objective.context.vocabulary
    views = len(objective.views(config))
    shape = (size, *[views] * bool(views), 3, config.image_size, config.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    batch = {"views" if views else "image": pixels, "position": torch.arange(size) + seed * size}
    if vocabulary is not None and objective.reads_captions:
        tokens = torch.randint(4, vocabulary.size, (size, config.text_length), generator=generator)
        tokens[:, 0], tokens[:, -1] = vocabulary.bos, vocabulary.eos
        batch["tokens"] = tokens
    return batch


def kind_batch(objective: Objective, kind: str, size: int, words: int) -> KindBatch:
    """Returns black images, where the kind has some, and texts of so many random words, or of as many as the model
    takes."""
    config, vocabulary = objective.config, objective.context.vocabulary
    batch = KindBatch(kind, {"position": torch.arange(size)})
    if kind not in ("text", "bitext"):
        shape = (size, *[len(objective.views(config))] * bool(objective.views(config)))
        pixels = torch.zeros((), dtype=torch.uint8).expand(*shape, 3, config.image_size, config.image_size)
        batch["views" if objective.views(config) else "image"] = pixels
    if vocabulary is None or not objective.reads_captions:
        return batch
    generator = torch.Generator().manual_seed(0)
    language = [torch.full((size, 1), i) for i in vocabulary.language_ids[:1]]
    words = min(words, config.text_length - 2 - len(language))
    text = torch.randint(4, vocabulary.size - 1, (size, words), generator=generator)
    bos, eos = (torch.full((size, 1), i) for i in (vocabulary.bos, vocabulary.eos))
    source, target = torch.cat([bos, text, eos, *language], 1), torch.cat([*(language or [bos]), text, eos], 1)
    return KindBatch(kind, batch | ({"source": source, "target": target} if "bitext" in kind else {"tokens": source}))
