"""Optional packages: imported where they are used; the error of a missing one names its extra."""

import importlib
from types import ModuleType

from mug.run.common.errors import RunError


def load_package(name: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        RunError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # a dependency of the package
            name = f"{name} (which needs {error.name})"
        raise RunError(f"package {name} is not installed: pip install -c constraints.txt -e '.[{extra}]'") from error
