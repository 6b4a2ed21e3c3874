"""The console scripts of an installed package: `mug-pretrain` runs run/pretrain.py, and so on."""

import functools
import runpy
from collections.abc import Callable


def __getattr__(name: str) -> Callable[[], None]:
    """Run the command in run/NAME.py."""
    if name.startswith("_"):
        raise AttributeError(name)
    return functools.partial(_run, name)


def _run(name: str) -> None:
    runpy.run_module(f"mug.run.{name}", run_name="__main__", alter_sys=True)
