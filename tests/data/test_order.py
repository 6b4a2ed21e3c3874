import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mug.data import rng
from mug.data.errors import DataError
from mug.data.order import Order


@given(st.integers(1, 200), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_each_epoch_takes_every_row_once(samples, seed, epoch):
    order = Order(samples, seed)
    located = [order.locate(epoch * samples + place) for place in range(samples)]
    assert {e for e, _ in located} == {epoch}
    assert sorted(row for _, row in located) == list(range(samples))


def test_epochs_and_seeds_differ():
    def rows(seed, epoch):
        return [Order(100, seed).locate(100 * epoch + i)[1] for i in range(100)]

    orders = {tuple(rows(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_is_frozen():
    """A run that is resumed under another numpy, or another version of this file, must find the same order."""
    assert [Order(10, 0).locate(i)[1] for i in range(10)] == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert [Order(10, 7).locate(i)[1] for i in range(30, 40)] == [2, 0, 7, 3, 5, 4, 8, 9, 1, 6]


def test_every_place_is_equally_likely():
    first = np.bincount([Order(10, seed).locate(0)[1] for seed in range(5000)], minlength=10)
    assert ((first - 500) ** 2 / 500).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001


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
        Order(10, seed)
