#!/usr/bin/env python3
"""Convert a checkpoint that an earlier version of this program wrote (format 2), so that this one can read it.

    python run/convert_checkpoint.py runs/OLD runs/NEW

OLD is a run's folder, of which the newest intact checkpoint counts, or one of its checkpoint-STEP folders; it stays as
it is. NEW becomes a run's folder, which the commands resume, evaluate, export and initialize from as any other.
"""

from pathlib import Path

from jsonargparse import Namespace

from mug.run.common.command_line import Parser
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RunError
from mug.run.state import checkpoint, format2


def main(console: Console) -> None:
    options = parse()
    old, new = Path(options.old), Path(options.new)
    if checkpoint.list_folders(new):
        raise RunError(f"{new} holds checkpoints: choose another directory for the converted one")
    named = (old / checkpoint.MANIFEST).is_file()
    found = checkpoint.verify(old, format2.FORMAT) if named else checkpoint.newest(old, console.warn, format2.FORMAT)
    if found is None:
        raise RunError(f"{old} does not hold a checkpoint; name a run's folder or one of its checkpoint-STEP folders")
    console.info(f"converted {found.folder} to {format2.convert(found, new)}")


def parse(arguments: list[str] | None = None) -> Namespace:
    """Parse the command line.

    Raises:
        RunError: an unknown flag, or a folder is missing.
    """
    parser = Parser(prog="convert_checkpoint.py", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=str, help="the run's folder, or a checkpoint-STEP folder, to read")
    parser.add_argument("new", type=str, help="the run's folder to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
