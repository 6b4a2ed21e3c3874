"""Small shards and tokenizers, made of random pictures and known captions."""

from pathlib import Path

import numpy as np
import pytest
from encoded import encode
from hypothesis import settings

from mug.data.builders.tokenizer_training import train_tokenizer
from mug.data.builders.writers import write_tar

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")


def caption_of(i: int) -> str:
    return f"picture number {i}"


@pytest.fixture
def make_shards():
    """Function (folder, counts) → shards of random PNGs with captions; sample i is the same wherever it lies."""

    def make(folder: Path, counts: list[int], prefix: str = "train") -> list[Path]:
        folder.mkdir(exist_ok=True)
        paths, i = [], 0
        for shard, count in enumerate(counts):
            members = []
            for i in range(i, i + count):  # noqa: B020
                random = np.random.default_rng(i)
                size = random.integers(20, 40, 2).tolist()
                members.append((f"{i:05d}.png", encode(random.integers(0, 256, (*size, 3), dtype=np.uint8))))
                members.append((f"{i:05d}.txt", caption_of(i).encode()))
            i += 1
            paths.append(folder / f"{prefix}-{shard:05d}.tar")
            write_tar(paths[-1], members)
        return paths

    return make


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    """A tokenizer.json trained on the captions of `make_shards`."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer((caption_of(i) for i in range(200)), 2048).save(str(path))
    return path
