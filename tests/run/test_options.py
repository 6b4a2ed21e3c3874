"""The options and recipe keys are frozen: a new one is a decision, not an accident.

After such a decision, write the new list down: python tests/run/test_options.py
"""

from pathlib import Path

from mug.run.training.recipe import build_parser

FROZEN = Path(__file__).with_name("options.txt")


def options() -> str:
    """A line an option of run/pretrain.py: its dotted name and its default."""
    defaults = vars(build_parser().get_defaults().as_flat())
    return "".join(f"{name} = {value!r}\n" for name, value in sorted(defaults.items()))


def test_options_are_those_that_were_decided_on():
    assert options() == FROZEN.read_text()


if __name__ == "__main__":
    FROZEN.write_text(options())
