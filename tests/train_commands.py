"""Command lines of the commands that train, parsed as these parse them."""

from mug.run import finetune, pretrain, segment
from mug.run.training.recipe import Command, Recipe, parse_command

DEFAULTS = {"pretrain": pretrain.DEFAULT_RECIPE, "finetune": finetune.DEFAULT_RECIPE, "segment": segment.DEFAULT_RECIPE}
DEEPSPEED = ["--deepspeed", "ds_configs/zero1.json"]


def parse(command: str, arguments: list[str]) -> Command:
    """What run/COMMAND.py makes of its arguments."""
    return parse_command(f"{command}.py", "", DEFAULTS[command], arguments)


def recipe_of(command: str, *options: str) -> Recipe:
    """The recipe of run/COMMAND.py with these options."""
    return parse(command, [*DEEPSPEED, *options]).recipe
