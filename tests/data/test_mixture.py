"""Several streams as one: their shares, their samples, and that a run resumes anywhere."""

import itertools
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from streams import read_together, rows, take

from mug.data.config import DataConfig
from mug.data.crops import ViewConfig
from mug.data.errors import DataError
from mug.data.kinds import labelled, pairs
from mug.data.kinds.samples import Samples, Shape
from mug.data.loader import load
from mug.data.mixture import Mixture, StreamConfig, locate, open_held_out, open_stream
from mug.data.stream import BatchShard, TrainStream

WEIGHTS = (0.6, 0.3, 0.1)
SHAPE = Shape(image_size=16, text_length=8)
GLOBAL_BATCH, GROUPS = 24, 2
GROUP = GLOBAL_BATCH // GROUPS
COUNTS = {"a": [12, 9], "b": [16], "c": [5, 6, 7]}


# --- Which stream -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_shares_hold_at_any_time(seed):
    drawn = np.array([locate(WEIGHTS, seed, group)[0] for group in range(4096)])
    for stream, weight in enumerate(WEIGHTS):
        exact = weight * np.arange(1, 4097)
        assert np.abs(np.cumsum(drawn == stream) - exact).max() < 4


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 2**63 - 1), st.integers(0, 10**15))
def test_counts_go_up_by_one_where_a_stream_is_drawn(weights, seed, start):
    counts = {}
    for group in range(start, start + 60):
        stream, before = locate(weights, seed, group)
        assert 0 <= stream < len(weights) and counts.get(stream, before) == before <= group
        counts[stream] = before + 1
        assert abs(before - group * weights[stream] / sum(weights)) < 35  # log 10^15; a double counts there by 1/8


@given(st.lists(st.floats(1e-2, 1), min_size=1, max_size=5), st.integers(0, 2**63 - 1), st.integers(0, 400))
def test_counts_are_those_of_going_through_all_groups(weights, seed, group):
    before = Counter(locate(weights, seed, earlier)[0] for earlier in range(group))
    stream, count = locate(weights, seed, group)
    assert count == before[stream]


def test_a_far_group_is_found_at_once():
    locate(WEIGHTS, 0, 0)
    begin = time.perf_counter()
    stream, before = locate(WEIGHTS, 0, 10**9)
    assert time.perf_counter() - begin < 5e-3
    assert abs(before - 10**9 * WEIGHTS[stream]) < 10


def test_seeds_draw_otherwise_and_a_rare_stream_is_not_forgotten():
    runs = [tuple(locate(WEIGHTS, seed, group)[0] for group in range(50)) for seed in range(20)]
    assert len(set(runs)) > 15
    rare = [group for group in range(4_000) if locate((1.0, 1e-3), 0, group)[0] == 1]
    assert 3 <= len(rare) <= 5


# --- Streams of real shards -------------------------------------------------------------------------------


@pytest.fixture
def streams(tmp_path, make_shards, tokenizer_file) -> dict[str, StreamConfig]:
    configs = {}
    for name, weight in zip(COUNTS, WEIGHTS, strict=True):
        make_shards(tmp_path / name, COUNTS[name])
        options = {"tokenizer": str(tokenizer_file), "cache": str(tmp_path / "cache"), "workers": 0}
        configs[name] = StreamConfig(DataConfig(shards=f"{tmp_path}/{name}/*.tar", **options), weight=weight)
    return configs


def open_mixture(streams, rank=0, world=1, micro_batch=1, seed=0, shape=SHAPE) -> TrainStream:
    return open_stream(streams, seed, shape, BatchShard(GLOBAL_BATCH, micro_batch, rank, world, GROUPS))


def global_batches(streams, world: int, micro_batch: int, steps: int, state: dict | None = None) -> tuple[list, dict]:
    return read_together(lambda rank: open_mixture(streams, rank, world, micro_batch), world, steps, state)


def test_a_group_is_the_next_samples_of_its_stream(streams):
    mixture = open_mixture(streams).source
    assert isinstance(mixture, Samples) and len(mixture) == 55
    seen = Counter()
    for group in range(40):
        batch, _ = mixture.batch(range(group * GROUP, (group + 1) * GROUP))
        name, shift = mixture.locate(group * GROUP)
        assert name == "abc"[locate(WEIGHTS, 0, group)[0]]
        own = range(seen[name] * GROUP, (seen[name] + 1) * GROUP)
        assert group * GROUP + shift == own.start
        expected, _ = mixture.streams[name].batch(own)
        assert torch.equal(batch["image"], expected["image"]) and torch.equal(batch["tokens"], expected["tokens"])
        assert batch["position"].tolist() == list(range(group * GROUP, (group + 1) * GROUP)) and batch.kind == "pairs"
        seen[name] += 1
    assert 22 <= seen["a"] <= 26 and 10 <= seen["b"] <= 14 and 2 <= seen["c"] <= 6
    assert len({0, *(stream.order.seed for stream in mixture.streams.values())}) == 4, "each draws by its own seed"


def test_micro_batches_of_a_step_are_of_one_kind_on_all_ranks(streams):
    for rank in range(3):
        stream = open_mixture(streams, rank, world=3, micro_batch=2)
        for step in itertools.islice(stream, 3):
            names = [{stream.source.locate(p)[0] for p in batch["position"].tolist()} for batch in step]
            assert [len(one) for one in names] == [1] * 4 and names[0] == names[1] and names[2] == names[3]
            stream.advance()
    with pytest.raises(ValueError, match="positions 11 and 12 are of two groups"):
        stream.source.batch([11, 12])


def test_a_run_that_is_killed_resumes_at_any_number_of_ranks(streams):
    expected, _ = global_batches(streams, world=1, micro_batch=12, steps=12)
    assert [[row[0] for row in step] for step in expected] == [list(range(24 * i, 24 * i + 24)) for i in range(12)]
    taken, state = [], None
    for world, micro_batch, steps in [(2, 3, 3), (3, 4, 1), (6, 1, 5), (1, 6, 3)]:
        part, state = global_batches(streams, world, micro_batch, steps, state)
        taken += part
        assert state["next_position"] == 24 * len(taken)
    assert taken == expected


def test_the_state_is_small_and_skipped_ranges_stay(streams):
    stream = open_mixture(streams)
    steps = iter(stream)
    next(steps), stream.advance()
    next(steps), stream.skip()
    state = json.loads(json.dumps(stream.state_dict()))
    assert state["skipped"] == [[24, 48]] and state["next_position"] == 48
    assert state["weights"] == {"a": 0.6, "b": 0.3, "c": 0.1} and state["group"] == 12 and state["samples"] == 55
    again = open_mixture(streams)
    again.load_state_dict(state)
    assert again.state_dict() == stream.state_dict()
    assert take(again, 1) == [[row for batch in next(steps) for row in rows(batch)]]


def changed(streams, what: str) -> TrainStream:
    if what == "weights":
        return open_mixture({**streams, "a": StreamConfig(streams["a"].config, weight=0.7)})
    if what == "streams":
        return open_mixture({name: streams[name] for name in "ab"})
    if what == "group":
        return open_stream(streams, 0, SHAPE, BatchShard(GLOBAL_BATCH, 1, 0, 1, 4))
    return open_mixture(streams, seed=1)


@pytest.mark.parametrize(
    ("what", "names"), [("weights", "weights"), ("streams", "samples"), ("group", "group"), ("seed", "seed")]
)
def test_another_mixture_is_refused(streams, what, names):
    state = open_mixture(streams).state_dict()
    with pytest.raises(DataError, match=f"the checkpoint's data has {names} "):
        changed(streams, what).load_state_dict(state)


def own_positions(stream: TrainStream, groups: range) -> dict[str, list[int]]:
    """Which of each stream's groups these groups are."""
    found: dict[str, list[int]] = {}
    for group in groups:
        name, shift = stream.source.locate(group * GROUP)
        found.setdefault(name, []).append(group + shift // GROUP)
    return found


def test_a_stream_that_joins_later_begins_and_the_others_continue(streams):
    two = {name: streams[name] for name in "ab"}
    early = open_mixture(two)
    first_steps = take(early, 10)
    state = json.loads(json.dumps(early.state_dict()))
    with pytest.raises(DataError, match="the checkpoint's data has samples 37, this run's has 55"):
        open_mixture(streams).load_state_dict(state)
    stream = open_mixture(streams)
    stream.load_state_dict(state, allow_changes=True)
    assert stream.next_position == 240
    own = own_positions(stream, range(60))
    assert own.keys() == {"a", "b", "c"} and all(one == list(range(len(one))) for one in own.values())
    assert own_positions(stream, range(20)) == own_positions(early, range(20)) and len(own["c"]) in (3, 4, 5)
    again = open_mixture(two)
    assert take(again, 10) == first_steps, "what was trained before stays"
    # It is one run from now on: killed again, it needs no permission, at any number of ranks.
    later = json.loads(json.dumps(stream.state_dict()))
    expected, _ = global_batches(streams, 1, 12, 6, later)
    parts, middle = global_batches(streams, 2, 3, 2, later)
    assert parts + global_batches(streams, 3, 2, 4, middle)[0] == expected
    # Streams may leave, too, and come back.
    alone = open_mixture({name: streams[name] for name in "ac"})
    alone.load_state_dict(middle, allow_changes=True)
    back = open_mixture(streams)
    back.load_state_dict(json.loads(json.dumps(alone.state_dict())), allow_changes=True)
    assert all(one == list(range(len(one))) for one in own_positions(back, range(200)).values())


def test_permission_to_change_the_mixture_is_none_to_change_a_stream(streams, tmp_path, make_shards):
    two = {name: streams[name] for name in "ab"}
    state = open_mixture(two).state_dict()
    make_shards(tmp_path / "b", [15, 1])
    with pytest.raises(DataError, match=r"the checkpoint's data has b\.fingerprint \w+, this run's has"):
        open_mixture(streams).load_state_dict(state, allow_changes=True)
    with pytest.raises(DataError, match="the checkpoint's data has samples 21, this run's has"):
        alone = open_mixture({"a": streams["a"]}).state_dict()
        open_mixture(two).load_state_dict(alone, allow_changes=True)


def test_a_stream_whose_shards_changed_is_named(streams, tmp_path, make_shards):
    state = open_mixture(streams).state_dict()
    make_shards(tmp_path / "b", [15, 1])
    with pytest.raises(DataError, match=r"the checkpoint's data has b\.fingerprint \w+, this run's has"):
        open_mixture(streams).load_state_dict(state)


def test_the_order_in_which_streams_are_named_does_not_matter(streams):
    backwards = dict(reversed(streams.items()))
    assert open_mixture(backwards).state_dict() == open_mixture(streams).state_dict()
    assert take(open_mixture(backwards), 2) == take(open_mixture(streams), 2)


def test_one_stream_is_what_it_is_without_a_mixture(streams):
    only = {"a": streams["a"]}
    alone = TrainStream(pairs.open_train(streams["a"].config, 0, SHAPE), BatchShard(GLOBAL_BATCH, 1, 0, 1), 0)
    stream = open_mixture(only)
    assert take(stream, 4) == take(alone, 4) and stream.state_dict() == alone.state_dict()
    mixture = Mixture({"a": (alone.source, 1.0)}, 0, GROUP)
    for group in (0, 1, 7, 10**6):
        positions = range(group * GROUP, (group + 1) * GROUP)
        assert rows(mixture.batch(positions)[0]) == rows(alone.source.batch(positions)[0])


def test_what_cannot_be_used_has_the_mixtures_position_and_its_streams_epoch(streams, tmp_path):
    for path in (tmp_path / "b").iterdir():
        data = path.read_bytes()
        at = data.index(b"00003.png") + 512
        path.write_bytes(data[:at] + b"<htm" + data[at + 4 :])
    stream = open_mixture(streams, micro_batch=12)
    take(stream, 20)
    replaced = stream.take_replacements()
    assert {entry.key for entry in replaced} == {"00003"} and [entry.epoch for entry in replaced] == [
        *range(len(replaced))
    ]
    order = stream.source.streams["b"].order
    for entry in replaced:
        name, shift = stream.source.locate(entry.position)
        assert name == "b" and [x.item() for x in order.locate(np.array([entry.position + shift]))] == [
            entry.epoch,
            0,
            3,
        ]


def test_streams_of_several_kinds(streams, tmp_path):
    for number in range(6):
        path = tmp_path / "images" / ("train", "test")[number % 3 == 2] / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (40 * number,) * 3).save(path)
    images = StreamConfig(labelled.LabelledConfig(images=str(tmp_path / "images"), workers=0), kind="labelled")
    stream = open_mixture({"web": streams["a"], "drawings": images})
    assert stream.source.class_names == ("cat", "dog") and stream.tokenizer is not None
    assert stream.source.files().keys() == {"tokenizer.json"}
    found = Counter()
    for batch, _ in load(stream.source, [range(12 * i, 12 * i + 12) for i in range(8)], workers=1):
        found[batch.kind] += 1
        assert set(batch) == {"image", "position", "target" if batch.kind == "labelled" else "tokens"}
    assert found["labelled"] >= 4 and found["pairs"] >= 2  # weights 1 and 0.6
    held_out = open_held_out({"web": streams["a"], "drawings": images}, SHAPE)
    assert {name: len(samples) for name, samples in held_out.items()} == {"drawings": 2}
    with pytest.raises(DataError, match="labelled images are read in one view"):
        open_mixture({"web": streams["a"], "drawings": images}, shape=Shape(16, 8, (ViewConfig(),)))


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused(streams, weight):
    with pytest.raises(DataError, match=r"data\.b\.weight is .*: give more than 0, or leave the stream out"):
        open_mixture({**streams, "b": StreamConfig(streams["b"].config, weight=weight)})


def test_a_kind_that_does_not_exist_is_refused(streams):
    with pytest.raises(DataError, match="'pictures' is not a kind of data"):
        open_mixture({**streams, "b": StreamConfig(streams["b"].config, kind="pictures")})


def test_streams_with_other_tokenizers_are_refused(streams, tmp_path, tokenizer_file):
    other = Path(tmp_path / "tokenizer.json")
    other.write_text(tokenizer_file.read_text(encoding="utf-8").replace('"picture"', '"pictures"'), encoding="utf-8")
    streams["c"].config.tokenizer = str(other)
    with pytest.raises(DataError, match=r"data\.a and data\.b and data\.c differ in their tokenizer"):
        open_mixture(streams)
