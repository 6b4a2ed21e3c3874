"""Measures the cost of planning the order of samples at scale, and how well it mixes the shards."""

import time
import tracemalloc
from collections.abc import Iterator

import numpy as np

from mug.data.order import Order

BATCH = 4096
SEEKS = 20


def shard_counts(samples: int, shards: int) -> np.ndarray:
    """int64 [shards]: uneven shards of `samples` in all."""
    return np.random.default_rng(0).multinomial(samples, np.full(shards, 1 / shards))


def metrics(samples: int, shards: int) -> Iterator[tuple[str, str]]:
    """Yields name and value of each metric."""
    counts_S = shard_counts(samples, shards)
    order = Order(counts_S, seed=0)
    yield "samples, shards", f"{order.total:,}, {shards:,}"
    yield "lanes, samples a window", f"{order.lanes:,}, {order.window:,}"
    yield "dropped an epoch", f"{order.total - len(order):,}"
    yield f"plan and seek, median of {SEEKS}", f"{np.median(seek_times(counts_S)) * 1e3:.1f} ms"
    yield "plan and seek, peak memory", f"{seek_memory(counts_S) / 2**20:.1f} MiB"
    yield "order", f"{time_per_sample(order) * 1e6:.2f} us a sample"
    yield f"same-shard pairs in a batch of {BATCH:,}", f"{same_shard_pairs(order):.2f} x a uniform shuffle's"
    for ranks in (8, 64, 512):
        yield f"shards that a rank of {ranks} reads in 100 batches", f"{shards_of_a_rank(order, ranks):,}"


def seek(counts_S: np.ndarray, seed: int, position: int) -> None:
    """Compute the samples of the batch at `position` from the shards' counts only."""
    Order(counts_S, seed).locate(np.arange(position, position + BATCH))


def _positions(samples: int, count: int) -> list[int]:
    return np.random.default_rng(1).integers(0, 6 * samples, count).tolist()


def seek_times(counts_S: np.ndarray) -> list[float]:
    """Returns the seconds of SEEKS seeks, each from scratch."""
    times = []
    for seed, position in enumerate(_positions(int(counts_S.sum()), SEEKS)):
        begin = time.perf_counter()
        seek(counts_S, seed, position)
        times.append(time.perf_counter() - begin)
    return times


def seek_memory(counts_S: np.ndarray) -> int:
    """Returns the peak bytes of a seek, in addition to the counts."""
    tracemalloc.start()
    seek(counts_S, SEEKS, _positions(int(counts_S.sum()), 1)[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def time_per_sample(order: Order) -> float:
    """Returns the seconds a sample, over 50 batches of one epoch."""
    order.locate(np.arange(BATCH))
    begin = time.perf_counter()
    for batch in range(50):
        order.locate(np.arange(batch * BATCH, (batch + 1) * BATCH))
    return (time.perf_counter() - begin) / (50 * BATCH)


def same_shard_pairs(order: Order) -> float:
    """Returns the pairs of samples from one shard in a global batch, relative to those of a uniform shuffle."""
    found, trials = 0, 50
    for start in np.random.default_rng(2).integers(0, len(order) // BATCH, trials) * BATCH:
        counts = np.unique(order.locate(np.arange(start, start + BATCH))[1], return_counts=True)[1]
        found += int((counts * (counts - 1) // 2).sum())
    share_S = order.counts_S / order.total
    return found / (trials * BATCH * (BATCH - 1) / 2 * float((share_S**2).sum()))


def shards_of_a_rank(order: Order, ranks: int) -> int:
    """Returns the number of different shards that rank 0 reads from in 100 batches: what a cache must hold."""
    return len(np.unique(order.locate(np.arange(0, 100 * BATCH, ranks))[1]))
