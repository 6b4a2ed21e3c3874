"""A parser whose errors are one line, for the entry point to print; and the bounds of numbers."""

import operator
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from mug.run.common.errors import RunError

# Bounds of any option's number: an integer fits in 64 bits, and sums and products of a few stay finite.
LARGEST = {int: 2**63, float: 1e100}


class Parser(ArgumentParser):
    def __init__(self, **options: object):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, *args: Any, **options: Any) -> Namespace:
        """Parse, and raise RunError for a number that is not finite (`.nan`, `.inf`) or too large."""
        parsed = super().parse_args(*args, **options)
        for name, value in _numbers(vars(parsed.as_flat())):
            if not abs(value) < (largest := LARGEST[type(value)]):
                raise RunError(f"{name} is {value}; give a number, finite and below {largest:.3g}")
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Raise RunError instead of printing the usage."""
        lines = [line.strip(" -") for line in str(message).splitlines() if line.strip(" -")]
        raise RunError(" ".join(lines)) from ex

    def parse_path(self, path: str | os.PathLike, **options: object) -> Namespace:
        """Parse a file as UTF-8; jsonargparse would read it in the locale's encoding.

        Raises:
            RunError: it has another encoding.
        """
        try:
            content = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise RunError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
        return self.parse_string(content, os.path.basename(path), **options)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a value, however deep, each with its dotted name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, name)
    elif type(value) in LARGEST:
        yield name, value


def check_min(values: Any, minima: Mapping[str, float], flag: str = "") -> None:
    """Check that numbers are at least their minimum; None passes.

    Args:
        values: options or a recipe, whose attributes the numbers are.
        minima: dotted name → min value.
        flag: what stands before the name on the command line, for the message.

    Raises:
        RunError: a number is below its minimum, or not a number.
    """
    for name, bound in minima.items():
        value = operator.attrgetter(name)(values)
        if value is not None and not value >= bound:
            raise RunError(f"{flag}{name} must be at least {bound}, not {value}")
