"""Small models whose every parameter matters, and batches of random images with known tokens."""

import dataclasses

import pytest
import torch
from plain import VOCABULARY, pairs

from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Context
from mug.model.presets import Vocabulary, resolve

MICRO = MUGConfig(
    image_size=32,
    patch_size=8,
    width=32,
    depth=2,
    heads=2,
    pixel_width=32,
    pixel_depth=1,
    pixel_heads=2,
    text_width=32,
    text_heads=2,
    text_unimodal_layers=1,
    text_cross_layers=1,
    text_length=8,
)


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return VOCABULARY


@pytest.fixture(scope="session")
def make_model(vocabulary):
    """Function (preset or "micro", options of MUGConfig) → MUG.

    `noise` is added to every parameter, so that biases and norms are not at their neutral start.
    """

    def make(preset: str = "micro", *, noise: float = 0.02, seed: int = 7, vocabulary=vocabulary, **options) -> MUG:
        base = MICRO if preset == "micro" else MUGConfig(preset=preset)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = resolve(dataclasses.replace(base, **options))
            model = MUG(config, Context(seed=seed, vocabulary=vocabulary))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=noise)
        return model

    return make


@pytest.fixture(scope="session")
def base(make_model) -> MUG:
    """The BASE preset, with the smallest text decoder: for tests of the image side."""
    return make_model("base", text_unimodal_layers=0, text_cross_layers=1)


@pytest.fixture(scope="session")
def make_batch():
    """Function (model, number of words of each caption or None) → batch; None is a sample without caption."""

    def make(model: MUG, words: list[int | None], seed: int = 0) -> dict[str, torch.Tensor]:
        config, vocabulary, random = model.config, model.vocabulary, torch.Generator().manual_seed(seed)
        B, size, T = len(words), config.image_size, config.text_length
        tokens = torch.full((B, T), vocabulary.pad)
        for b, count in enumerate(words):
            if count is not None:
                caption = torch.randint(4, vocabulary.size, (count,), generator=random)
                tokens[b, : count + 2] = torch.tensor([vocabulary.bos, *caption, vocabulary.eos])
        return {
            "image": torch.randint(0, 256, (B, 3, size, size), generator=random, dtype=torch.uint8),
            "tokens": tokens,
            "position": torch.arange(B) * 1000 + 5,
        }

    return make


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Four images, three of them with a caption."""
    return pairs([6, 1, None, 4])


@pytest.fixture(scope="session")
def normalized():
    """Function: uint8 image → fp32, less ImageNet's mean, over its standard deviation."""

    def normalize(image: torch.Tensor) -> torch.Tensor:
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        return (image / 255 - mean) / std

    return normalize
