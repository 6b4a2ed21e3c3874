"""Losses that some micro-batches do not have: their share of the total, and their means."""

import pytest
import torch
from ranks import run_gloo_ranks

from mug.run.cluster.losses import WeightedMeans, loss_scales, total_loss


def assert_absent_losses_count_as_nothing() -> None:
    """Two ranks of two micro-batches; `match` is in the second alone, where rank 1 has no term of it."""
    rank = torch.distributed.get_rank()
    counts = [{"caption": 3 + rank}, {"caption": 1, "match": (5, 0)[rank]}]
    scales = loss_scales(counts, ("caption", "match"))
    # 9 captions and 5 matches on the two ranks, times 4 micro-batches.
    torch.testing.assert_close(scales, torch.tensor([[(3 + rank) * 4 / 9, 0], [4 / 9, (4.0, 0.0)[rank]]]))
    losses = [{"caption": torch.tensor(2.0)}, {"caption": torch.tensor(4.0), "match": torch.tensor(7.0 - rank)}]
    weights = {"caption": 1.0, "match": 0.5, "order": 2.0}  # of `order` this step has nothing
    means, totals = WeightedMeans(), []
    for one, count, row in zip(losses, counts, scales, strict=True):
        totals.append(total_loss(one, weights, dict(zip(("caption", "match"), row, strict=True))))
        means.add(one, {f"accuracy/{name}": value / 10 for name, value in one.items()}, count)
    caption = (7 * 2 + 2 * 4) / 9
    expected = {"loss/caption": caption, "accuracy/caption": caption / 10, "loss/match": 7.0, "accuracy/match": 0.7}
    assert means.reduce(weights) == pytest.approx({"loss/total": caption + 3.5, **expected})
    total = sum(totals) / 4
    torch.distributed.all_reduce(total)
    assert total.item() == pytest.approx(caption + 3.5)


def test_a_loss_that_a_micro_batch_does_not_have_counts_as_nothing():
    run_gloo_ranks(2, assert_absent_losses_count_as_nothing)
