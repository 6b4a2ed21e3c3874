"""Which samples a model is evaluated on, and which of them each rank takes."""

from dataclasses import dataclass

from mug.data.order import spread
from mug.data.stream import BatchShard


@dataclass(frozen=True)
class HeldOutBatch:
    """Positions of a rank's micro-batch.

    real: False for padding, which ranks without a sample left read, so that all call the model equally often. It
        counts as nothing.
    """

    positions: list[int]
    real: bool = True


def plan(total: int, wanted: int, share: BatchShard, whole_groups: bool = False) -> list[list[HeldOutBatch]]:
    """Returns this rank's micro-batches of each group, of at most `wanted` of `total` samples, spread evenly.

    Groups are as large as in training and hold the same samples for any number of ranks. The j-th micro-batch of a
    group has the same size on all ranks. The last group may be smaller: what ranks cannot share evenly is in its last
    micro-batch, of one sample, which is padding on some of them. So padding is never batched with real samples.

    whole_groups: leave the last group out where it is smaller, for losses that depend on the group's size. Where
        there are fewer samples than one group has, it is made of those that ranks can share evenly.
    """
    positions = spread(total, wanted)
    if whole_groups:
        kept = len(positions) // share.group * share.group or len(positions) // share.world * share.world
        positions = spread(total, kept) if kept else []
    starts = range(0, len(positions), share.group)
    return [_group(positions[start : start + share.group], share) for start in starts]


def _group(positions: list[int], share: BatchShard) -> list[HeldOutBatch]:
    even = len(positions) // share.world * share.world
    mine, rest = positions[share.rank : even : share.world], positions[even:]
    batches = [HeldOutBatch(mine[i : i + share.micro_batch]) for i in range(0, len(mine), share.micro_batch)]
    if rest:
        real = share.rank < len(rest)
        batches.append(HeldOutBatch([rest[share.rank] if real else rest[-1]], real))
    return batches
