"""What is evaluated, and by whom."""

import itertools

import pytest

from mug.data.held_out import HeldOutBatch, plan
from mug.data.order import spread
from mug.data.stream import BatchShard


def test_samples_are_spread_evenly_over_the_set():
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 10) == [0, 1, 2] and spread(5, 5) == [0, 1, 2, 3, 4]
    assert spread(10, 0) == [] and spread(0, 4) == []
    wide = spread(200_000_000, 10_000)
    assert len(wide) == 10_000 and {b - a for a, b in itertools.pairwise(wide)} == {20_000}


def plans(total: int, wanted: int, world: int, micro_batch: int = 2, group: int = 12, **options):
    return [plan(total, wanted, BatchShard(2 * group, micro_batch, r, world, 2), **options) for r in range(world)]


def groups_of(ranks: list[list[list[HeldOutBatch]]]) -> list[list[int]]:
    """The positions of each group that count, of all ranks."""
    return [
        sorted(position for part in parts for batch in part if batch.real for position in batch.positions)
        for parts in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("total", [1, 5, 12, 23, 24, 31, 100])
def test_ranks_share_each_sample_once_in_as_many_batches_of_the_same_sizes(world, total):
    ranks = plans(total, 29, world)
    shapes = [[[len(batch.positions) for batch in group] for group in rank] for rank in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    assert all(1 <= size <= 2 for group in shapes[0] for size in group)
    assert groups_of(ranks) == [spread(total, 29)[i : i + 12] for i in range(0, min(total, 29), 12)]
    padding = [batch for rank in ranks for group in rank for batch in group if not batch.real]
    assert len(padding) == -min(total, 29) % 12 % world and all(len(batch.positions) == 1 for batch in padding)


def test_a_rank_takes_the_places_that_it_has_in_training():
    (first, second) = plan(100, 17, BatchShard(24, 2, rank=1, world=3, groups=2))
    expected = spread(100, 17)
    assert [batch.positions for batch in first] == [expected[1:6:3], expected[7:12:3]]
    assert second == [HeldOutBatch([expected[13]]), HeldOutBatch([expected[16]])]
    assert plan(100, 17, BatchShard(24, 2, 2, 3, 2))[1] == [
        HeldOutBatch([expected[14]]),
        HeldOutBatch([expected[16]], False),
    ]


def test_only_whole_groups_where_the_loss_depends_on_their_size():
    for world in (1, 2, 3):
        ranks = plans(100, 29, world, whole_groups=True)
        assert groups_of(ranks) == [spread(100, 24)[:12], spread(100, 24)[12:]]
        assert all(batch.real and len(batch.positions) == 2 for rank in ranks for group in rank for batch in group)


def test_fewer_samples_than_a_group_make_one_that_ranks_share_evenly():
    ranks = plans(100, 8, 3, whole_groups=True)
    assert [[batch.positions for batch in group] for (group,) in ranks] == [[[0, 50]], [[16, 66]], [[33, 83]]]
    assert plans(2, 8, 3, whole_groups=True) == [[], [], []]
