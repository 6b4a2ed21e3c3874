"""The objective's held-out losses next to those of a model that has learned nothing but frequencies.

Of a loss that predicts one of some classes, words for example, the floor is the entropy of its held-out targets'
unigrams: no prediction that ignores the input is better. Of one that finds a sample among those of its group, it is
chance.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from mug.data.kinds.samples import Samples
from mug.model.objectives.objective import KnowsFloors
from mug.run.cluster import hardware
from mug.run.evaluators.evaluator import EvalConfig, Result, Subject
from mug.run.evaluators.losses import HeldOutLosses


@dataclass(frozen=True)
class FloorsConfig(EvalConfig):
    """Held-out losses next to their floors, of `trainer.eval_samples` samples spread over the set."""


class Seen(NamedTuple):
    """What a rank has seen of a stream: by loss the frequencies of its targets, and by group the terms of each loss."""

    targets: dict[str, Counter[int]]
    terms: list[Counter[str]]


class Floors(HeldOutLosses):
    """`floor/NAME` in nats, as `loss/NAME` of evaluation losses; of each stream where there are several, after its name
    and a slash. Shows a table of losses and floors; the record has both."""

    Config = FloorsConfig
    needs = KnowsFloors

    def run(self, subject: Subject) -> Result:
        found: dict[str, tuple[float, float]] = {}
        for stream, samples in self.context.held_out.items():
            losses, floors = self._of_stream(subject, samples), self._floors(subject, samples)
            found |= {f"{stream}/{name}".lstrip("/"): (losses[f"loss/{name}"], floors[name]) for name in floors}
        for line in table(found):
            self.context.console.info(line)
        about = {"method": "floors", "encoder": self.encoder_name(subject), "data": "held-out samples"}
        floors = {_metric("floor", name): floor for name, (_, floor) in found.items()}
        losses = {_metric("loss", name): loss for name, (loss, _) in found.items()}
        return Result(floors, [about | losses | floors] if found else [])

    def _floors(self, subject: Subject, samples: Samples) -> dict[str, float]:
        """Returns the floor of each loss of a stream; a collective call."""
        objective: Any = subject.module
        ranks = hardware.gather([self._seen(subject, samples)])
        floors, counts = {}, Counter[str]()
        for parts in zip(*(rank.terms for rank in ranks), strict=True):
            terms = sum(parts, Counter[str]())  # of a group, over all ranks
            for name, chance in ((name, objective.chance(count).get(name)) for name, count in terms.items()):
                if chance is not None:
                    floors[name] = floors.get(name, 0.0) + terms[name] * chance
                    counts[name] += terms[name]
        floors = {name: total / counts[name] for name, total in floors.items()}
        for name in sorted({name for rank in ranks for name in rank.targets}):
            floors[name] = entropy(sum((rank.targets.get(name, Counter()) for rank in ranks), Counter[int]()))
        return floors

    def _seen(self, subject: Subject, samples: Samples) -> Seen:
        """Returns what this rank sees; a collective call."""
        objective: Any = subject.module
        groups = self._groups(subject, samples)
        seen = Seen({}, [Counter() for _ in groups])
        fetched: Iterator = self._fetch(subject, samples, groups)
        for group, terms in zip(groups, seen.terms, strict=True):
            for one in group:
                (batch,) = next(fetched)
                if one.real:
                    terms.update(objective.counts(batch))
                    for name, target_K in objective.targets(batch).items():
                        seen.targets.setdefault(name, Counter()).update(target_K.tolist())
        return seen


def entropy(counts: Counter[int]) -> float:
    """Returns the entropy of a distribution, in nats, of how often each class comes."""
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values())


def table(found: dict[str, tuple[float, float]]) -> list[str]:
    """Returns the lines of a table of losses and floors, by loss."""
    head = "held out"
    width = max(map(len, [head, *found]))
    rows = [
        f"{name:{width}}  {loss:8.3f}  {floor:8.3f}  {'below' if loss < floor else 'not below'}"
        for name, (loss, floor) in found.items()
    ]
    return [f"{head:{width}}  {'loss':>8}  {'floor':>8}", *rows] if rows else []


def _metric(kind: str, name: str) -> str:
    """`pairs/mlm` → `pairs/loss/mlm`."""
    stream, slash, loss = name.rpartition("/")
    return f"{stream}{slash}{kind}/{loss}"
