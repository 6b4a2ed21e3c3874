"""Floors of held-out losses against entropies written out, for one rank and for three."""

import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from evaluation import eval_context, quiet_console, subject_of
from ranks import found_by_ranks

from mug.data.kinds.samples import Batch
from mug.data.order import spread
from mug.model.objectives.mae import MAE
from mug.model.objectives.objective import Context, CoupledObjective
from mug.run.common.errors import RunError
from mug.run.evaluators.floors import Floors, FloorsConfig, entropy, table

SAMPLES, GROUP = 31, 12


class Guesses(CoupledObjective):
    """Predicts the remainder of a number by 5, and which of its group it is; an odd number has no group."""

    losses = {"remainder": 1.0, "which": 1.0}  # noqa: RUF012

    def counts(self, batch):
        return {"remainder": len(batch["value"]), "which": int((batch["value"] % 2 == 0).sum())}

    def features(self, batch):
        return {"value": batch["value"].float()}, None

    def coupled_losses(self, features):
        return {"which": features["value"].mean()}, {}

    def own_losses(self, batch, rest):
        return {"remainder": batch["value"].float().mean() / 10}, {}

    def targets(self, batch):
        return {"remainder": batch["value"] % 5}

    def chance(self, samples):
        return {"which": math.log(samples)}


class Unknown(CoupledObjective):
    """Knows no floors."""

    losses = {"x": 1.0}  # noqa: RUF012

    def __init__(self):
        super().__init__(None, Context())


@dataclass
class Numbers:
    count: int

    def __len__(self):
        return self.count

    def batch(self, positions):
        positions = torch.tensor(list(positions))
        return Batch("pairs", {"value": positions**2, "position": positions}), []


def evaluate(folder) -> dict:
    lines: list[str] = []
    context = eval_context(
        folder,
        open_held_out=lambda: {"one": Numbers(SAMPLES), "two": Numbers(GROUP)},
        loss_weights=Guesses.losses,
        micro_batch=2,
        group=GROUP,
        console=quiet_console(lines),
    )
    found = Floors(FloorsConfig(), context).run(subject_of(Guesses(None, Context())))
    return {"metrics": found.metrics, "records": found.records, "lines": lines}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_floors_are_entropies_of_all_ranks_targets(world, tmp_path):
    found = found_by_ranks(world, evaluate, tmp_path)
    expected = {}
    for stream, samples in {"one": spread(SAMPLES, 2 * GROUP), "two": range(GROUP)}.items():
        remainders = Counter(n * n % 5 for n in samples)
        shares = [count / len(samples) for count in remainders.values()]
        even = [sum(n % 2 == 0 for n in samples[i : i + GROUP]) for i in range(0, len(samples), GROUP)]
        expected[f"{stream}/floor/remainder"] = -sum(share * math.log(share) for share in shares)
        expected[f"{stream}/floor/which"] = sum(n * math.log(n) for n in even) / sum(even)
    assert found["metrics"] == pytest.approx(expected)
    (record,) = found["records"]
    assert record["method"] == "floors" and record["two/loss/remainder"] == pytest.approx(506 / 12 / 10)
    assert {name: record[name] for name in expected} == pytest.approx(expected)
    (line,) = (line for line in found["lines"] if line.startswith("two/remainder"))
    assert line.split() == ["two/remainder", "4.217", f"{expected['two/floor/remainder']:.3f}", "not", "below"]


def test_the_table_says_which_losses_are_below():
    assert entropy(Counter({3: 2, 4: 1, 5: 1})) == pytest.approx(1.5 * math.log(2))
    assert table({"mlm": (1.25, 2.0), "itm": (0.7, 0.69)}) == [
        "held out      loss     floor",
        "mlm          1.250     2.000  below",
        "itm          0.700     0.690  not below",
    ]
    assert table({}) == []


def test_an_objective_that_knows_no_floors_is_refused(tmp_path):
    assert Floors.suits(Guesses) and not Floors.suits(MAE)
    with pytest.raises(RunError, match="an objective that knows the losses of a model that ignores its inputs"):
        Floors(FloorsConfig(), eval_context(tmp_path)).check(Unknown())
