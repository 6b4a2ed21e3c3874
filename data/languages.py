"""Checks that pairs have captions in the wanted languages: where they have none, another one stands in."""

import logging
from collections import Counter
from collections.abc import Iterator

from mug.data.captions import TEXT_LANGUAGE, languages_in
from mug.data.errors import BadSample, DataError
from mug.data.reader import Reader
from mug.data.store.remote import is_remote

LOOKED_AT = 1000  # pairs, spread over the shards: a language that one in 200 has is missed once in 150 data sets
LOOKED_AT_REMOTE = 32  # of the first shard only
SHOWN = 20  # languages, in a message
FEW = 0.01  # share of the pairs, of one of the wanted languages
MANY = 0.1  # share of the pairs, of those that have none of them

log = logging.getLogger("mug")


def check_languages(reader: Reader, wanted: tuple[str, ...], option: str = "data.language") -> None:
    """Look at some pairs; warn, with counts, where few have captions in the languages that `option` wants.

    English alone is not checked: it is what stands in. Pairs without any caption do not count.

    Raises:
        DataError: none of the pairs has a caption in any of the wanted languages, but some have others.
    """
    if wanted == (TEXT_LANGUAGE,):
        return
    found = [languages for languages in _looked_at(reader) if languages]
    counts = Counter(language for languages in found for language in languages)
    if not found:
        return
    looked = f"of {len(found):,} captioned pairs checked (of {len(reader.index):,})"
    frequent = sorted(counts, key=lambda language: (-counts[language], language))[:SHOWN]
    if not any(counts[language] for language in wanted):
        raise DataError(
            f"{option} is '{','.join(wanted)}', but none {looked} has a caption in it; give languages that they have:"
            f" {_counted(frequent, counts)}"
        )
    without = sum(not languages & set(wanted) for languages in found)
    if without > MANY * len(found) or any(counts[language] < FEW * len(found) for language in wanted):
        log.warning(
            f"{option} is '{','.join(wanted)}': {looked}, {without:,} have none of it, and another caption stands in;"
            f" they have {_counted([*wanted, *frequent], counts)}"
        )


def _counted(languages: list[str], counts: Counter[str]) -> str:
    return ", ".join(f"{language} ({counts[language]:,})" for language in dict.fromkeys(languages))


def _looked_at(reader: Reader) -> Iterator[set[str]]:
    """Yields the languages of some pairs."""
    places = reader.spread(LOOKED_AT)
    if any(map(is_remote, reader.index.urls)):
        places = ((0, row) for row in range(min(LOOKED_AT_REMOTE, int(reader.index.counts_S[0]))))
    for shard, row in places:
        try:
            text, meta = reader.read_texts(shard, row)
        except BadSample:
            continue
        yield languages_in(text, meta)
