"""Patterns of paths and URLs as bash expands them: braces, then globs.

Braces are lists `{x,y}` and ranges `{01..10}`, `{a..c}`, `{10..1..3}`, nested; what is neither stays as it is. The
words of a string are separated by commas and spaces outside braces.
"""

import re
from collections.abc import Iterator
from itertools import islice

from braceexpand import UnbalancedBracesError, braceexpand  # pyrefly: ignore[missing-module-attribute]  # in its code

from mug.data.errors import DataError
from mug.data.store.remote import redact_url

MAX_WORDS = 1_000_000  # of a pattern: a range with too many digits ends in a message, not in swap
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?")


def words(text: str) -> list[str]:
    """Returns the patterns in a string, at whose commas and spaces outside braces it is cut."""
    found, word, depth = [], "", 0
    for i, character in enumerate(text):
        depth += character == "{" and "}" in text[i:]
        depth -= character == "}" and depth > 0
        if depth == 0 and (character == "," or character.isspace()):
            found.append(word)
            word = ""
        else:
            word += character
    return [word for word in (*found, word) if word] or [""]


def braces(pattern: str) -> list[str]:
    """Returns what a pattern's braces stand for, in bash's order; the pattern itself where it has none that close.

    Raises:
        DataError: it stands for more than MAX_WORDS.
    """
    found = list(islice(_expanded(pattern), MAX_WORDS + 1))
    if len(found) > MAX_WORDS:
        raise _too_many(pattern)
    return found


def first_of_braces(pattern: str) -> str:
    """Returns the first of what the braces of a pattern stand for, without expanding the others."""
    return next(_expanded(pattern))


def _expanded(pattern: str) -> Iterator[str]:
    for first, last, step in RANGE.findall(pattern):  # braceexpand builds an entire range at once
        if abs(int(last) - int(first)) // max(1, int(step or 1)) >= MAX_WORDS:
            raise _too_many(pattern)
    try:
        return braceexpand(pattern, escape=False)
    except UnbalancedBracesError:
        return iter([pattern])


def _too_many(pattern: str) -> DataError:
    return DataError(f"'{redact_url(pattern)}' stands for more than {MAX_WORDS:,} shards: correct its range")


def as_glob(pattern: str) -> str:
    """Returns the pattern as Python's glob reads it: `[^a]` is `[!a]`, and `**` no more than `*`, as in a plain bash.

    Raises:
        DataError: it names characters by class, `[[:digit:]]`.
    """
    if re.search(r"\[[^]/]*\[:\w+:\]", pattern):
        raise DataError(f"'{redact_url(pattern)}' names a class of characters: write them out, such as [0-9]")
    return re.sub(r"\*{2,}", "*", re.sub(r"\[\^", "[!", pattern))
