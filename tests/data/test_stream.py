import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import one_colour
from streams import read_together, rows, take

from mug.data.builders.writers import write_tar
from mug.data.config import DataConfig
from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.data.errors import DataError
from mug.data.kinds.pairs import open_held_out
from mug.data.kinds.samples import Shape
from mug.data.mixture import StreamConfig, open_stream
from mug.data.stream import BatchShard, TrainStream

SHAPE = Shape(image_size=16, text_length=8)
COUNTS = [12, 9, 16]  # samples per shard: 37, which no batch divides
GLOBAL_BATCH = 24


@pytest.fixture
def config(tmp_path, make_shards, tokenizer_file) -> DataConfig:
    make_shards(tmp_path / "shards", COUNTS)
    return DataConfig(
        shards=f"{tmp_path}/shards/*.tar", tokenizer=str(tokenizer_file), cache=str(tmp_path / "cache"), workers=0
    )


def open_pairs(config: DataConfig, rank=0, world=1, micro_batch=1, seed=0) -> TrainStream:
    share = BatchShard(GLOBAL_BATCH, micro_batch, rank, world)
    return open_stream({"pairs": StreamConfig(config)}, seed, SHAPE, share)


def global_batches(config: DataConfig, world: int, steps: int, state: dict | None = None) -> tuple[list, dict]:
    return read_together(lambda rank: open_pairs(config, rank, world, GLOBAL_BATCH // world), world, steps, state)


def test_the_form_of_a_step(config):
    step = next(iter(open_pairs(config, rank=1, world=6, micro_batch=2)))
    assert len(step) == 2
    for batch, positions in zip(step, [[1, 7], [13, 19]], strict=True):
        assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (2, 3, 16, 16)
        assert batch["tokens"].dtype == torch.int64 and batch["tokens"].shape == (2, 8)
        assert batch["position"].dtype == torch.int64 and batch["position"].tolist() == positions


def test_positions_run_on_and_each_epoch_takes_every_caption_once(config):
    stream = open_pairs(config)
    taken = [row for step in take(stream, 37) for row in step]  # 24 epochs
    assert [position for position, _, _ in taken] == list(range(37 * 24))
    orders = []
    for epoch in range(24):
        captions = [stream.tokenizer.decode(t) for _, _, t in taken[37 * epoch : 37 * (epoch + 1)]]
        assert sorted(captions) == sorted(f"picture number {i}" for i in range(37))
        orders.append(tuple(captions))
    assert len(set(orders)) == 24
    assert len({image for _, image, _ in taken}) > 0.95 * len(taken)  # a new crop each time


def test_a_sample_is_its_own_image_and_caption(config, tmp_path):
    colours = {f"{i:02d}": (7 * i, 3 * i, 255 - i) for i in range(30)}
    members = []
    for key, colour in colours.items():
        members += [(f"{key}.png", one_colour(colour, (30, 20))), (f"{key}.txt", key.encode())]
    write_tar(tmp_path / "colours.tar", members)
    config.shards = f"{tmp_path}/colours.tar"
    stream = open_pairs(config)
    batch, replaced = stream.source.batch(range(60))
    assert batch["position"].tolist() == list(range(60)) and not replaced
    for image, tokens in zip(batch["image"], batch["tokens"], strict=True):
        key = "".join(stream.tokenizer.decode(tokens).split())
        assert (image.numpy() == np.reshape(colours[key], (3, 1, 1))).all()


def test_half_of_the_samples_are_flipped(config):
    config.crop_scale = (1.0, 1.0)
    flipped, _ = open_pairs(config).source.batch(range(400))
    config.flip = False
    plain, _ = open_pairs(config).source.batch(range(400))
    flips = []
    for a, b in zip(flipped["image"], plain["image"], strict=True):
        assert torch.equal(a, b) or torch.equal(a, b.flip(-1))
        flips.append(not torch.equal(a, b))
    assert 0.4 < np.mean(flips) < 0.6


@pytest.mark.parametrize("workers", [0, 1, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_and_workers_change_nothing(config, workers):
    expected, _ = global_batches(config, world=1, steps=4)
    config.workers = workers
    for world in (1, 2, 3, 4, 6, 8):
        assert global_batches(config, world, steps=4)[0] == expected


def test_accumulation_changes_nothing(config):
    expected = take(open_pairs(config, micro_batch=24), 3)
    for micro_batch in (1, 2, 8):
        assert take(open_pairs(config, micro_batch=micro_batch), 3) == expected


@pytest.mark.parametrize("workers", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_resuming_twice_on_other_numbers_of_ranks_continues_as_if_nothing_had_happened(config, workers):
    config.workers = workers
    boundary = 37  # global batches of 24: the end of step 37 is the end of epoch 24
    expected, _ = global_batches(config, world=1, steps=boundary + 4)
    random = np.random.default_rng()
    first, second = sorted(random.choice(np.arange(2, boundary), 2, replace=False).tolist())  # inside epochs ≥ 1
    for stops in ([first, second], [boundary]):
        print(f"stopped after steps {stops}")
        done, taken, state = 0, [], None
        for stop in [*stops, boundary + 4]:
            world = int(random.choice([1, 2, 3, 4, 6, 8]))
            part, state = global_batches(config, world, stop - done, state)
            taken, done = taken + part, stop
            assert (state["epoch"], state["next_position"]) == (24 * stop // 37, 24 * stop)
        assert taken == expected


def test_prefetching_moves_nothing(config):
    config.workers = 2
    stream = open_pairs(config, micro_batch=2)
    steps = iter(stream)
    for _ in range(3):
        next(steps)
    assert stream.next_position == 0
    stream.advance()
    assert stream.next_position == GLOBAL_BATCH
    assert rows(next(iter(stream))[0])[0][0] == GLOBAL_BATCH


def test_another_seed_is_refused(config):
    with pytest.raises(DataError, match="seed 1, this run's has 0"):
        open_pairs(config).load_state_dict(open_pairs(config, seed=1).state_dict())


def test_a_changed_shard_is_refused(config, tmp_path, make_shards):
    state = open_pairs(config).state_dict()
    make_shards(tmp_path / "shards", [12, 10, 15])
    with pytest.raises(DataError, match=rf"fingerprint {state['fingerprint']}, this run's has \w+: resume with"):
        open_pairs(config).load_state_dict(state)


@pytest.mark.parametrize("name", ["version", "tokenizer", "samples", "lanes", "window"])
def test_a_state_of_another_kind_is_refused(config, name):
    stream = open_pairs(config)
    with pytest.raises(DataError, match=f"{name} other"):
        stream.load_state_dict(stream.state_dict() | {name: "other"})
    with pytest.raises(DataError, match=f"{name} None"):
        stream.load_state_dict({k: v for k, v in stream.state_dict().items() if k != name})


def test_a_batch_that_does_not_divide_is_refused(config):
    with pytest.raises(DataError, match="global batch 24 is not divisible by micro batch 5 x 2 ranks"):
        open_pairs(config, world=2, micro_batch=5)
    with pytest.raises(DataError, match="micro batch 0"):
        open_pairs(config, micro_batch=0)


def test_micro_batches_lie_in_groups_of_consecutive_positions():
    share = BatchShard(24, 2, rank=1, world=3, groups=2)
    assert (share.group, share.accumulation) == (12, 2)
    assert [list(positions) for positions in share.positions(48)] == [[49, 52], [55, 58], [61, 64], [67, 70]]
    assert share.positions(0) == BatchShard(24, 2, 1, 3).positions(0), "groups move no sample"


@pytest.mark.parametrize(("groups", "micro_batch", "world"), [(5, 1, 1), (4, 4, 1), (2, 4, 2), (0, 1, 1)])
def test_groups_that_do_not_divide_are_refused(groups, micro_batch, world):
    message = f"global batch 24 is not divisible by {groups} groups x micro batch {micro_batch} x {world} ranks"
    with pytest.raises(DataError, match=message):
        BatchShard(24, micro_batch, 0, world, groups)


def test_an_empty_list_of_shards_is_refused(config):
    config.shards = ""
    with pytest.raises(DataError, match="missing shards"):
        open_pairs(config)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_in_mid_run_is_named_once(config, tmp_path, workers):
    config.workers = workers
    stream = open_pairs(config)
    for path in (tmp_path / "shards").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"^shard '[^']*train-0000\d\.tar'[^\n]*$"):
        next(iter(stream))


def test_own_shards_need_a_tokenizer(config):
    config.tokenizer = None
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        open_pairs(config)


def test_a_text_length_without_room_is_refused(config):
    with pytest.raises(DataError, match="text length 2"):
        open_stream({"pairs": StreamConfig(config)}, 0, Shape(16, 2), BatchShard(8, 8, 0, 1))


def damage(shards: Path, keys: set[int]) -> None:
    """Put bytes that are no image in the place of some; nothing moves."""
    for path in shards.iterdir():
        data = bytearray(path.read_bytes())
        for key in keys:
            at = data.find(f"{key:05d}.png".encode())
            if at >= 0:
                data[at + 512 : at + 516] = b"<htm"
        path.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_used_is_replaced_and_written_down_and_moves_nothing_else(config, tmp_path, workers):
    config.workers = workers
    sound = {row[0]: row for step in take(open_pairs(config), 6) for row in step}
    damage(tmp_path / "shards", {3, 20})
    first = open_pairs(config, rank=0, world=2), open_pairs(config, rank=1, world=2)
    taken = {row[0]: row for stream in first for step in take(stream, 6) for row in step}
    replaced = sorted(entry for stream in first for entry in stream.take_replacements())
    assert {entry.key for entry in replaced} == {"00003", "00020"}
    assert {Path(entry.shard).name for entry in replaced} == {"train-00000.tar", "train-00001.tar"}
    assert all("not an image" in entry.reason and entry.shard_samples in (12, 9) for entry in replaced)
    positions = {entry.position for entry in replaced}
    assert 7 <= len(positions) <= 8  # each epoch once, in 3.9 epochs
    assert {p for p in sound if sound[p] != taken[p]} == positions
    captions = {open_pairs(config).tokenizer.decode(taken[p][2]) for p in positions}
    assert not captions & {"picture number 3", "picture number 20"}  # those of other samples
    again = open_pairs(config)
    assert {row[0]: row for step in take(again, 6) for row in step} == taken
    assert sorted(again.take_replacements()) == replaced and again.take_replacements() == []


def test_only_what_was_trained_on_is_written_down(config, tmp_path):
    damage(tmp_path / "shards", {3})
    stream = open_pairs(config)
    steps = iter(stream)
    for _ in range(3):  # 72 samples: the bad one for sure
        next(steps)
    assert stream.take_replacements() == []
    for _ in range(3):
        stream.advance()
    assert [entry.key for entry in stream.take_replacements()] == ["00003"] * 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_of_bad_samples_alone_stops_the_run_in_one_line(config, tmp_path, workers):
    damage(tmp_path / "shards", set(range(12)))
    config.workers = workers
    with pytest.raises(DataError, match=r"^shard '.*train-00000.tar': 9 samples in a row cannot be used, the last '0"):
        take(open_pairs(config), 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_state_is_left_alone(config, workers):
    config.workers = workers
    before = torch.get_rng_state()
    take(open_pairs(config), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_of_several_captions_is_drawn_again_each_epoch(config, tmp_path):
    captions = {"en": ["picture", "number"], "de": "1 2 3"}
    members = []
    for i in range(40):
        members += [(f"{i}.png", one_colour()), (f"{i}.json", json.dumps({"captions": captions}).encode())]
    write_tar(tmp_path / "captions.tar", members)
    config.shards, config.language = f"{tmp_path}/captions.tar", "en,de"
    stream = open_pairs(config)
    batch, _ = stream.source.batch(range(400))
    drawn = [stream.tokenizer.decode(tokens) for tokens in batch["tokens"]]
    counts = {caption: drawn.count(caption) for caption in set(drawn)}
    assert set(counts) == {"picture", "number", "1 2 3"} and min(counts.values()) > 100
    again, _ = open_pairs(config).source.batch(range(400))
    assert torch.equal(again["tokens"], batch["tokens"])


def test_held_out_pairs(config, tmp_path, make_shards):
    assert open_held_out(config, SHAPE) is None
    make_shards(tmp_path / "held_out", [3, 2])
    config.held_out = f"{tmp_path}/held_out/*.tar"
    pairs = open_held_out(config, SHAPE)
    assert len(pairs) == 5
    batch, replaced = pairs.batch(range(5))
    assert batch["position"].tolist() == list(range(5)) and not replaced
    for i in range(5):
        assert pairs.tokenizer.decode(batch["tokens"][i]) == f"picture number {i}"
        image, *_ = pairs.reader.read(*divmod(i, 3))
        assert (batch["image"][i].numpy() == decode_crop(image, 16, CentralSquare())).all()


TRAINER = """
import sys
from mug.data.config import DataConfig
from mug.data.kinds.samples import Shape
from mug.data.mixture import StreamConfig, open_stream
from mug.data.stream import BatchShard

if __name__ == "__main__":
    config = DataConfig(shards=sys.argv[1], tokenizer=sys.argv[2], cache=sys.argv[3], workers=2)
    steps = iter(open_stream({"pairs": StreamConfig(config)}, 0, Shape(16, 8), BatchShard(8, 4, 0, 1)))
    next(steps)
    print("ready", flush=True)
    input()
"""


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    return [d for child in map(int, children) for d in [child, *descendants(child)]]


def test_workers_end_with_a_trainer_that_is_killed(config, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    command = [sys.executable, str(script), config.shards, config.tokenizer, config.cache]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout.readline() == "ready\n"
        processes = descendants(trainer.pid)
        assert len(processes) >= 3  # the fork server and two workers
        os.kill(trainer.pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in processes):
        assert time.monotonic() < end, "workers outlived their trainer"
        time.sleep(0.1)
