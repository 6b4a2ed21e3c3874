"""From losses by name to one total, and to metrics that are the same for any number of ranks.

An objective's loss is a mean over what it counts in one micro-batch (masked patches, tokens to predict). Micro-
batches hold different numbers of tokens, so a mean of means would depend on how a global batch is cut. Here each
micro-batch counts by its share of the global batch's terms.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mug.run.cluster import hardware

Counts = Mapping[str, int]


def loss_scales(counts: Sequence[Counts], names: Sequence[str]) -> Tensor:
    """Returns fp32 [micro-batches, names]: the factor on the loss of each micro-batch of this rank.

    The engine averages over ranks and micro-batches; with these factors that average is the mean over the global
    batch. A loss that a micro-batch does not count has 0 terms there. A collective call. Nothing waits for the device
    here.
    """
    local = torch.tensor([[count.get(name, 0) for name in names] for count in counts], dtype=torch.float32)
    local = hardware.to_device({"counts": local})["counts"]
    total = local.sum(0)
    dist.all_reduce(total)
    return local * (len(counts) * dist.get_world_size()) / total.clamp(min=1)


def total_loss(losses: Mapping[str, Tensor], weights: Mapping[str, float], scales: Mapping[str, Tensor]) -> Tensor:
    """Returns the one weighted sum that is trained on: weight x scale x loss over the losses.

    A total that is not finite makes all gradients NaN. So their norm, which the engine looks at before it updates
    anything, shows it to all ranks, and no further message is needed.
    """
    total = sum(weights[name] * scales[name] * loss for name, loss in losses.items())
    return total * (1 + 0 * total.detach())


class WeightedMeans:
    """Means over micro-batches and ranks of losses (`loss/LOSS`) and metrics (`KIND/LOSS`), by LOSS's count.

    All ranks add the same names: the kind of a batch, which decides them, is the same on all.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.micro_batches: list[dict[str, Tensor]] = []  # the losses of each

    def add(self, losses: Mapping[str, Tensor], metrics: Mapping[str, Tensor], counts: Counts) -> None:
        """Add a micro-batch; a loss that `counts` does not name has weight 0."""
        self.micro_batches.append({name: loss.detach() for name, loss in losses.items()})
        for name, value in ({f"loss/{name}": loss for name, loss in losses.items()} | dict(metrics)).items():
            weighted = value.detach().double() * counts.get(_loss_of(name), 0)
            self.sums[name] = self.sums[name] + weighted if name in self.sums else weighted
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def reduce(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Returns the means over all ranks of what was added, with `loss/total` first.

        A collective call that waits for the device. The counts are those of the losses with a weight, in their order,
        so that ranks that have not counted the same losses still exchange as much.
        """
        counts = torch.tensor([self.counts.get(name, 0) for name in weights], dtype=torch.float64)
        packed = torch.cat([*(total[None] for total in self.sums.values()), counts.to(hardware.device())])
        dist.all_reduce(packed)
        values = packed.tolist()
        count_of = dict(zip(weights, values[len(self.sums) :], strict=True))
        metrics = {
            name: value / max(count_of[_loss_of(name)], 1)
            for name, value in zip(self.sums, values[: len(self.sums)], strict=True)
        }
        total = sum(weight * metrics.get(f"loss/{name}", 0.0) for name, weight in weights.items())
        return {"loss/total": total} | metrics


def _loss_of(name: str) -> str:
    """`accuracy/caption` is a mean over what `caption` counts."""
    return name.partition("/")[2]
