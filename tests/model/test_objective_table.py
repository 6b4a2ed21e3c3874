"""The table of docs/objectives.md names every objective, and its FLOP are those that the code counts."""

import re
from pathlib import Path

import pytest
import torch

from mug.model.objectives.objective import Context, find_objective, objective_names
from mug.model.presets import Vocabulary, resolve
from mug.run.benchmarks.synthetic import full_batch

DOCS = Path(__file__).parents[2] / "docs" / "objectives.md"
SAMPLES = 64  # over which a mean is taken: what is masked differs
CONTEXT = Context(vocabulary=Vocabulary(30522, pad=0, bos=1, eos=2, mask=3), class_names=("",) * 1000)


def stated() -> dict[str, float]:
    """Returns the objective and its GFLOP of each row."""
    rows = re.findall(r"^\| `(\w+)` \|.*?\| ([\d.]+) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: float(gflop) for name, gflop in rows}


def test_all_objectives_are_in_the_table():
    assert sorted(stated()) == objective_names()


@pytest.mark.parametrize("name", objective_names())
def test_the_tables_flop_are_the_codes(name):
    objective = find_objective(name)
    with torch.device("meta"):  # 100M weights that nothing computes with
        model = objective(resolve(objective.Config("base")), CONTEXT)
    assert stated()[name] == pytest.approx(model.flops(full_batch(model, SAMPLES)) / SAMPLES / 1e9, abs=0.06)
