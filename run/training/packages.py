"""Packages that only some commands need: imported where they are used, named with their extra where they lack."""

import importlib
from types import ModuleType

from mug.run.training.errors import RunError


def load_package(name: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        RunError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # a package that it needs in turn
            name = f"{name} (which needs {error.name})"
        raise RunError(f"package {name} is not installed: pip install -c constraints.txt -e '.[{extra}]'") from error
