"""The same pairs in tar, Arrow and Parquet shards are the same stream."""

import itertools

import numpy as np
import pytest
from encoded import encode
from test_stream import open_pairs, take

from mug.data.builders.writers import Sample, write_shards
from mug.data.config import DataConfig


def samples(count: int):
    for i in range(count):
        random = np.random.default_rng(i)
        image = encode(random.integers(0, 256, (*random.integers(20, 40, 2), 3), dtype=np.uint8))
        caption = f"picture number {i}" if i % 5 else ""
        yield Sample(f"{i:05d}", image, "png", caption, {"key": f"{i:05d}", "captions": {"de": ["eins", f"zwei {i}"]}})


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_in_the_same_order(tmp_path, tokenizer_file, workers):
    taken = {}
    for format in ("tar", "arrow", "parquet"):
        folder = tmp_path / format
        folder.mkdir()
        written = list(write_shards(samples(70), folder, "train-", format, per_shard=16))
        assert [count for _, count in written] == [16, 16, 16, 16, 6]
        config = DataConfig(
            shards=f"{folder}/*.{format}",
            tokenizer=str(tokenizer_file),
            cache=str(tmp_path / "cache"),
            language="en,de",
            workers=workers,
        )
        taken[format] = take(open_pairs(config, micro_batch=8), 7)  # over two epochs
    assert taken["tar"] == taken["arrow"] == taken["parquet"]
    positions = [row[0] for row in itertools.chain(*taken["tar"])]
    assert positions == list(range(7 * 24))
