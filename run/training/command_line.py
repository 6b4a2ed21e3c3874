"""A parser whose errors are one line, for the entry point to print."""

from jsonargparse import ArgumentParser

from mug.run.training.errors import RunError


class Parser(ArgumentParser):
    def __init__(self, **options: object):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Raise RunError instead of printing the usage."""
        lines = [line.strip(" -") for line in str(message).splitlines() if line.strip(" -")]
        raise RunError(" ".join(lines)) from ex
