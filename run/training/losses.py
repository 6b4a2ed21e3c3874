"""From losses by term to one total, and to figures that are the same for any number of ranks.

An objective's loss is a mean over what it counts in one micro-batch (masked patches, tokens to predict). Micro-
batches hold different numbers of tokens, so a mean of means would depend on how a global batch is cut. Here each
micro-batch counts by its share of the global batch's terms.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mug.run.training import hardware

Counts = Mapping[str, int]


def shares(counts: Sequence[Counts], terms: Sequence[str]) -> Tensor:
    """fp32 [micro-batches, terms]: by what to multiply the loss of each micro-batch of this rank.

    The engine averages over ranks and micro-batches; with these factors that average is the mean over the global
    batch. A collective call. Nothing waits for the device here.
    """
    local = torch.tensor([[count[term] for term in terms] for count in counts], dtype=torch.float32)
    local = local.to(hardware.device(), non_blocking=True)
    total = local.sum(0)
    dist.all_reduce(total)
    return local * (len(counts) * dist.get_world_size()) / total.clamp(min=1)


def total_loss(losses: Mapping[str, Tensor], weights: Mapping[str, float], share: Mapping[str, Tensor]) -> Tensor:
    """The one weighted sum that is trained on: weight x share x loss over the terms.

    A total that is not finite makes all gradients NaN. So their norm, which the engine looks at before it updates
    anything, tells all ranks of it, and no further message is needed.
    """
    total = sum(weights[term] * share[term] * loss for term, loss in losses.items())
    return total * (1 + 0 * total.detach())


class Means:
    """Means over micro-batches and ranks of losses (`loss/TERM`) and reports (`KIND/TERM`), by TERM's count."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}
        self.micro_batches: list[dict[str, Tensor]] = []  # the losses of each

    def add(self, losses: Mapping[str, Tensor], report: Mapping[str, Tensor], counts: Counts) -> None:
        self.micro_batches.append({term: loss.detach() for term, loss in losses.items()})
        figures = {f"loss/{term}": loss for term, loss in losses.items()} | dict(report)
        for name, value in figures.items():
            weighted = value.detach().double() * counts[_term(name)]
            self.sums[name] = self.sums[name] + weighted if name in self.sums else weighted
        for term, count in counts.items():
            self.counts[term] = self.counts.get(term, 0) + count

    def reduce(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The means over all ranks, with `loss/total` first. A collective call that waits for the device."""
        counts = torch.tensor(list(self.counts.values()), dtype=torch.float64)
        packed = torch.cat([torch.stack(list(self.sums.values())), counts.to(hardware.device())])
        dist.all_reduce(packed)
        values = packed.tolist()
        count_of = dict(zip(self.counts, values[len(self.sums) :], strict=True))
        figures = {
            name: value / max(count_of[_term(name)], 1)
            for name, value in zip(self.sums, values[: len(self.sums)], strict=True)
        }
        return {"loss/total": sum(weight * figures[f"loss/{term}"] for term, weight in weights.items())} | figures


def _term(name: str) -> str:
    """`accuracy/caption` is a mean over what `caption` counts."""
    return name.partition("/")[2]
