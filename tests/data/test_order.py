import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mug.data import rng
from mug.data.errors import DataError
from mug.data.order import Order, permute

COUNTS = st.lists(st.integers(0, 400), min_size=1, max_size=120).filter(any)
SEEDS = st.integers(0, 2**63 - 1)


def whole_epoch(order: Order, epoch: int) -> np.ndarray:
    """Global row numbers, int64 [len(order)]."""
    epochs, shards, rows = order.locate(np.arange(len(order)) + epoch * len(order))
    assert (epochs == epoch).all()
    assert (rows >= 0).all() and (rows < order.counts_S[shards]).all()
    return np.cumsum(order.counts_S)[shards] - order.counts_S[shards] + rows


@given(COUNTS, SEEDS, st.integers(0, 1000))
def test_each_epoch_takes_every_row_at_most_once_and_drops_less_than_a_lane_count(counts, seed, epoch):
    order = Order(np.array(counts), seed)
    rows = whole_epoch(order, epoch)
    assert len(np.unique(rows)) == len(rows) == len(order)
    assert 0 <= sum(counts) - len(order) < order.lanes
    assert sum(counts) - len(order) <= 0.01 * sum(counts)


@given(COUNTS, SEEDS, st.integers(1, 64), st.data())
def test_a_position_means_the_same_sample_however_it_is_asked_for(counts, seed, ranks, data):
    order = Order(np.array(counts), seed)
    start = data.draw(st.integers(0, 3 * len(order)))
    together = np.stack(order.locate(np.arange(start, start + 64)))
    fresh = Order(np.array(counts), seed)
    for rank in range(min(ranks, 64)):
        apart = np.stack(fresh.locate(np.arange(start + rank, start + 64, ranks)))
        assert (apart == together[:, rank::ranks]).all()


def test_a_rank_stays_in_its_lanes():
    """So that a node's cache serves it: ranks that divide L see disjoint parts of the line, epoch after epoch."""
    order = Order(np.full(4096, 500), seed=3)
    length = len(order) // order.lanes
    assert order.lanes == 1024
    for ranks in (2, 8, 64):
        positions = np.arange(5, 5 + 40 * ranks, ranks) + 2 * len(order) - 20 * ranks  # over an epoch's end
        for epoch in (1, 2):
            places = positions[positions // len(order) == epoch] - epoch * len(order)
            lanes = order._line(epoch, places) // length
            assert len(lanes) > 15 and set(lanes % ranks) == {5 % ranks}


def test_lanes_and_windows_of_the_scale_that_it_is_made_for():
    order = Order(np.full(20000, 9995), seed=0)
    assert order.constants() == {"lanes": 2048, "window": 48804}  # 5 shards: a lane of 9.8 has two windows
    assert order.total - len(order) == 864


def test_two_epochs_are_uncorrelated():
    order = Order(np.random.default_rng(0).integers(50, 150, 300), seed=1)
    places = {epoch: np.argsort(whole_epoch(order, epoch)[: order.total // 2]) for epoch in range(4)}
    for a, b in itertools.combinations(places.values(), 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(len(a))
    # Neighbours of one epoch are no neighbours in the next.
    first, second = whole_epoch(order, 0), whole_epoch(order, 1)
    pairs = {frozenset(pair) for pair in itertools.pairwise(first.tolist())}
    again = sum(frozenset(pair) in pairs for pair in itertools.pairwise(second.tolist()))
    assert again < 20  # 2 expected of a uniform shuffle


@pytest.mark.parametrize("batch", [256, 4096])
def test_a_batch_mixes_shards_like_a_uniform_shuffle(batch):
    order = Order(np.random.default_rng(0).integers(9000, 10001, 20000), seed=0)
    same = 0
    for start in np.random.default_rng(1).integers(0, len(order) - batch, 20):
        _, shards, _ = order.locate(np.arange(start, start + batch))
        _, counts = np.unique(shards, return_counts=True)
        same += (counts * (counts - 1) // 2).sum() / 20
    assert same <= 1.3 * batch * (batch - 1) / 2 / 20000 + 0.5


def test_epochs_and_seeds_differ():
    orders = {
        tuple(whole_epoch(Order(np.array([60, 40]), seed), epoch).tolist()) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9


def test_the_order_is_frozen():
    """A run that is resumed under another numpy, or another version of this file, must find the same order."""
    assert whole_epoch(Order(np.array([10]), 0), 0).tolist() == [3, 6, 4, 9, 1, 2, 7, 5, 0, 8]
    large = whole_epoch(Order(np.full(64, 2000), 7), 2)
    assert large[:: len(large) // 8].tolist() == [118170, 14630, 15089, 118876, 119694, 70362, 97139, 14911]


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size, key):
    result = permute(np.arange(size), np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert sorted(result.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_permute_draws_every_permutation_alike(size):
    permutations = list(itertools.permutations(range(size)))
    draws = 200 * len(permutations)
    keys = np.random.default_rng(0).integers(0, 2**64, draws, dtype=np.uint64)
    results = permute(np.tile(np.arange(size), draws), np.full(size * draws, size), np.repeat(keys, size))
    numbers = [permutations.index(tuple(result)) for result in results.reshape(draws, size).tolist()]
    counts = np.bincount(numbers, minlength=len(permutations))
    degrees = len(permutations) - 1
    assert ((counts - 200) ** 2 / 200).sum() < degrees + 4 * np.sqrt(2 * degrees) + 5


def test_every_row_is_equally_likely_in_every_place():
    order_of = [whole_epoch(Order(np.array([12, 8]), seed), 0) for seed in range(3000)]
    counts = np.zeros((20, 20))
    for rows in order_of:
        counts[np.arange(20), rows] += 1
    expected, degrees = 3000 / 20, 19 * 19
    assert ((counts - expected) ** 2 / expected).sum() < degrees + 4 * np.sqrt(2 * degrees)


def test_random_numbers_depend_on_each_key_and_on_nothing_else():
    base = rng.uniform(1, rng.CROP, 2, 3, 8)
    assert (base == rng.uniform(1, rng.CROP, 2, 3, 8)).all()
    others = [(0, rng.CROP, 2, 3), (1, rng.FLIP, 2, 3), (1, rng.CROP, 3, 3), (1, rng.CROP, 2, 4)]
    for key in others:
        assert not np.isin(rng.uniform(*key, 8), base).any()


def test_random_numbers_are_uniform():
    draws = np.concatenate([rng.uniform(0, rng.CROP, 0, position, 10) for position in range(2000)])
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 1 / 2) < 0.01 and abs(draws.var() - 1 / 12) < 0.005


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(DataError, match="seed"):
        Order(np.array([10]), seed)


def test_nothing_to_order_is_refused():
    with pytest.raises(DataError, match="no samples"):
        Order(np.array([0, 0]), 0)
