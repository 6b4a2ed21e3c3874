import hashlib
import io
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mug.data.config import DataConfig
from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.data.errors import DataError
from mug.data.openmoji import write_tar
from mug.data.shards import IMAGE
from mug.data.stream import Share, TrainStream, open_held_out, open_train

COUNTS = [12, 9, 16]  # samples per shard: 37, which no batch divides
GLOBAL_BATCH = 8


@pytest.fixture
def config(tmp_path, make_shards, tokenizer_file) -> DataConfig:
    make_shards(tmp_path / "shards", COUNTS)
    return DataConfig(shards=f"{tmp_path}/shards/*.tar", tokenizer=str(tokenizer_file), workers=0)


def open_stream(config: DataConfig, rank=0, world=1, micro_batch=GLOBAL_BATCH, seed=0) -> TrainStream:
    share = Share(GLOBAL_BATCH, micro_batch, rank, world)
    return open_train(config, seed, image_size=16, text_length=8, share=share)


def rows(step: list[dict]) -> list[tuple]:
    """(position, hash of the image, tokens) of each sample of a step, in order."""
    return [
        (int(p), hashlib.sha256(image.numpy().tobytes()).hexdigest(), tuple(tokens.tolist()))
        for batch in step
        for image, tokens, p in zip(batch["image"], batch["tokens"], batch["position"], strict=True)
    ]


def take(stream: TrainStream, steps: int) -> list[list[tuple]]:
    taken = []
    for step in itertools.islice(stream, steps):
        taken.append(rows(step))
        stream.advance()
    return taken


def test_the_form_of_a_step(config):
    step = next(iter(open_stream(config, rank=1, world=2, micro_batch=2)))
    assert len(step) == 2
    for batch, positions in zip(step, [[4, 5], [6, 7]], strict=True):
        assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (2, 3, 16, 16)
        assert batch["tokens"].dtype == torch.int64 and batch["tokens"].shape == (2, 8)
        assert batch["position"].dtype == torch.int64 and batch["position"].tolist() == positions


def test_positions_run_on_and_each_epoch_takes_every_caption_once(config):
    stream = open_stream(config)
    taken = [row for step in take(stream, 37) for row in step]  # 8 epochs
    assert [position for position, _, _ in taken] == list(range(37 * 8))
    orders = []
    for epoch in range(8):
        captions = [stream.tokenizer.decode(t) for _, _, t in taken[37 * epoch : 37 * (epoch + 1)]]
        assert sorted(captions) == sorted(f"picture number {i}" for i in range(37))
        orders.append(tuple(captions))
    assert len(set(orders)) == 8
    assert len({image for _, image, _ in taken}) > 0.95 * len(taken)  # a new crop each time


def test_a_sample_is_its_own_image_and_caption(config, tmp_path):
    colours = {f"{i:02d}": (7 * i, 3 * i, 255 - i) for i in range(30)}
    members = []
    for key, colour in colours.items():
        buffer = io.BytesIO()
        Image.new("RGB", (30, 20), colour).save(buffer, "PNG")
        members += [(f"{key}.png", buffer.getvalue()), (f"{key}.txt", key.encode())]
    write_tar(tmp_path / "colours.tar", members)
    config.shards = f"{tmp_path}/colours.tar"
    pairs = open_stream(config).pairs
    for position in range(60):
        sample = pairs[position]
        key = "".join(pairs.tokenizer.decode(sample["tokens"]).split())
        assert sample["position"] == position
        assert (sample["image"].numpy() == np.reshape(colours[key], (3, 1, 1))).all()


def test_half_of_the_samples_are_flipped(config):
    config.crop_scale = (1.0, 1.0)
    flipped = open_stream(config).pairs
    config.flip = False
    plain = open_stream(config).pairs
    flips = []
    for position in range(400):
        a, b = flipped[position]["image"], plain[position]["image"]
        assert torch.equal(a, b) or torch.equal(a, b.flip(-1))
        flips.append(not torch.equal(a, b))
    assert 0.4 < np.mean(flips) < 0.6


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_workers_and_accumulation_change_nothing(config, workers):
    expected = take(open_stream(config), 6)
    config.workers = workers
    for world, micro_batch in [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)]:
        if workers and micro_batch == 1:
            continue
        parts = [take(open_stream(config, rank, world, micro_batch), 6) for rank in range(world)]
        assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_goes_on_as_if_nothing_had_happened(config, workers):
    config.workers = workers
    expected = take(open_stream(config), 12)
    first = open_stream(config)
    assert take(first, 7) == expected[:7]  # into epoch 1
    state = first.state_dict()
    assert (state["epoch"], state["next_position"], state["samples"]) == (1, 56, 37)
    parts = []
    for rank in range(2):  # on another number of ranks
        resumed = open_stream(config, rank, world=2, micro_batch=2)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        parts.append(take(resumed, 5))
    assert [a + b for a, b in zip(*parts, strict=True)] == expected[7:]


def test_prefetching_moves_nothing(config):
    config.workers = 2
    stream = open_stream(config, micro_batch=2)
    steps = iter(stream)
    for _ in range(3):
        next(steps)
    assert stream.next_position == 0
    stream.advance()
    assert stream.next_position == GLOBAL_BATCH
    assert rows(next(iter(stream)))[0][0] == GLOBAL_BATCH


def test_another_seed_is_refused(config):
    with pytest.raises(DataError, match="seed 1, this run's has 0"):
        open_stream(config).load_state_dict(open_stream(config, seed=1).state_dict())


def test_a_changed_shard_is_refused(config, tmp_path, make_shards):
    state = open_stream(config).state_dict()
    make_shards(tmp_path / "shards", [12, 10, 15])
    with pytest.raises(DataError, match=rf"fingerprint {state['fingerprint']}, this run's has \w+: resume with"):
        open_stream(config).load_state_dict(state)


@pytest.mark.parametrize("name", ["version", "tokenizer", "samples"])
def test_a_state_of_another_kind_is_refused(config, name):
    stream = open_stream(config)
    with pytest.raises(DataError, match=f"{name} other"):
        stream.load_state_dict(stream.state_dict() | {name: "other"})
    with pytest.raises(DataError, match=f"{name} None"):
        stream.load_state_dict({k: v for k, v in stream.state_dict().items() if k != name})


def test_a_batch_that_does_not_divide_is_refused(config):
    with pytest.raises(DataError, match="global batch 8 is not divisible by micro batch 3 x 2 ranks"):
        open_stream(config, world=2, micro_batch=3)
    with pytest.raises(DataError, match="micro batch 0"):
        open_stream(config, micro_batch=0)


def test_an_empty_list_of_shards_is_refused(config):
    config.shards = ""
    with pytest.raises(DataError, match="missing shards"):
        open_stream(config)


def test_a_shard_that_goes_in_mid_run_is_named_once(config, tmp_path):
    stream = open_stream(config)
    for path in (tmp_path / "shards").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"^shard '[^']*', key '\d+': cannot be read: [^']*'[^']*'$"):
        next(iter(stream))


def test_own_shards_need_a_tokenizer(config):
    config.tokenizer = None
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        open_stream(config)


def test_a_text_length_without_room_is_refused(config):
    with pytest.raises(DataError, match="text length 2"):
        open_train(config, 0, 16, 2, Share(8, 8, 0, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named_in_one_line(config, tmp_path, workers):
    write_tar(tmp_path / "shards" / "train-00000.tar", [("bad.png", b"<html>"), ("bad.txt", b"x")])
    config.shards, config.workers = f"{tmp_path}/shards/train-00000.tar", workers
    with pytest.raises(DataError) as caught:
        next(iter(open_stream(config)))
    assert "train-00000.tar', key 'bad': the image cannot be decoded: not an image" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_state_is_left_alone(config, workers):
    config.workers = workers
    before = torch.get_rng_state()
    take(open_stream(config), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_held_out_pairs(config, tmp_path, make_shards):
    assert open_held_out(config, 16, 8) is None
    make_shards(tmp_path / "held_out", [3, 2])
    config.held_out = f"{tmp_path}/held_out/*.tar"
    pairs = open_held_out(config, 16, 8)
    assert len(pairs) == len(list(pairs)) == 5
    for i, sample in enumerate(pairs):
        assert sample["position"].item() == i
        assert pairs.tokenizer.decode(sample["tokens"]) == f"picture number {i}"
        expected = decode_crop(pairs.index.read(i, IMAGE), 16, CentralSquare())
        assert (sample["image"].numpy() == expected).all()


TRAINER = """
import sys
from mug.data.config import DataConfig
from mug.data.stream import Share, open_train

if __name__ == "__main__":
    config = DataConfig(shards=sys.argv[1], tokenizer=sys.argv[2], workers=2)
    steps = iter(open_train(config, 0, 16, 8, Share(8, 4, 0, 1)))
    next(steps)
    print("ready", flush=True)
    input()
"""


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [d for child in map(int, children) for d in [child, *descendants(child)]]


def test_workers_end_with_a_trainer_that_is_killed(config, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    command = [sys.executable, str(script), config.shards, config.tokenizer]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout.readline() == "ready\n"
        processes = descendants(trainer.pid)
        assert len(processes) >= 3  # the fork server and two workers
        os.kill(trainer.pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in processes):
        assert time.monotonic() < end, "workers outlived their trainer"
        time.sleep(0.1)
