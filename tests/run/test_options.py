"""The options and recipe keys are frozen: a new one is a decision, not an accident.

After such a decision, or for a new objective, write the new lists: python tests/run/test_options.py
"""

from pathlib import Path

import pytest

from mug.model.objectives.objective import objective_names
from mug.run.training.recipe import Named, build_parser

FROZEN = Path(__file__).parent / "options"


def options(objective: str) -> str:
    """A line an option of a command that trains this objective: its dotted name and its default."""
    defaults = vars(build_parser("x.py", "", Named(objective)).get_defaults().as_flat())
    return "".join(f"{name} = {value!r}\n" for name, value in sorted(defaults.items()))


@pytest.mark.parametrize("name", objective_names())
def test_options_are_those_that_were_decided_on(name):
    assert options(name) == (FROZEN / f"{name}.txt").read_text(encoding="utf-8")


def test_no_list_is_of_an_objective_that_is_gone():
    assert [path.stem for path in sorted(FROZEN.iterdir())] == objective_names()


if __name__ == "__main__":
    for old in FROZEN.glob("*.txt"):
        old.unlink()
    for name in objective_names():
        (FROZEN / f"{name}.txt").write_text(options(name), encoding="utf-8")
