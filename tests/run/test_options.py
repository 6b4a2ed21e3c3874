"""The options and recipe keys are frozen: a new one is a decision, not an accident.

After such a decision, write the new lists down: python tests/run/test_options.py
"""

from pathlib import Path

import pytest

from mug.run.finetuning import recipe as finetuning
from mug.run.segmentation import recipe as segmenting
from mug.run.training import recipe as training
from mug.run.training.command_line import Parser

FROZEN = {"options.txt": training.build_parser, "finetune_options.txt": finetuning.build_parser}
FROZEN["segment_options.txt"] = segmenting.build_parser
HERE = Path(__file__).parent


def options(parser: Parser) -> str:
    """A line an option: its dotted name and its default."""
    defaults = vars(parser.get_defaults().as_flat())
    return "".join(f"{name} = {value!r}\n" for name, value in sorted(defaults.items()))


@pytest.mark.parametrize("name", FROZEN)
def test_options_are_those_that_were_decided_on(name):
    assert options(FROZEN[name]()) == (HERE / name).read_text()


if __name__ == "__main__":
    for name, build_parser in FROZEN.items():
        (HERE / name).write_text(options(build_parser()))
