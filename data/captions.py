"""The caption of a pair: which ones it has in the wanted languages, which is taken, and its cleaning.

The .txt is the English caption. The .json may hold more, by language: `captions[language]` is a string or a list
of strings. A pair need not have any.
"""

import json

from mug.data.errors import BadSample

MAX_CHARACTERS = 10_000  # of a caption; far more than any text length, and a bound on the tokenizer's work
MAX_TEXT = 4 * MAX_CHARACTERS  # bytes that are looked at
MAX_JSON = 2**20  # bytes; a json beyond is not parsed
TEXT_LANGUAGE = "en"  # of the .txt


def clean(caption: str | bytes) -> str:
    """A caption as text that any tokenizer takes: valid UTF-8, no NUL, one line, of bounded length."""
    if isinstance(caption, bytes):
        caption = caption[:MAX_TEXT].decode("utf-8", errors="replace")
    caption = caption[:MAX_CHARACTERS].encode("utf-8", errors="ignore").decode("utf-8")  # lone surrogates go
    return " ".join(caption.replace("\0", " ").split())


def choose(text: bytes, json_text: bytes, languages: tuple[str, ...], draw: float) -> str:
    """One of a pair's captions, cleaned; "" where it has none.

    Args:
        text: The .txt, empty where there is none.
        json_text: The .json, likewise.
        languages: What to choose among. Where the pair has a caption in none of them, the .txt is taken.
        draw: In [0, 1). 0 takes the first caption of the first language.

    Raises:
        BadSample: there is no .txt, and the .json cannot be parsed.
    """
    found = captions(text, json_text, languages)
    return found[int(draw * len(found))] if found else ""


def captions(text: bytes, json_text: bytes, languages: tuple[str, ...]) -> list[str]:
    """What `choose` chooses among: distinct, not empty, in the order of the languages.

    Raises:
        BadSample: there is no .txt, and the .json cannot be parsed.
    """
    main = clean(text)
    # Most pairs have their one caption in the .txt, and a json without `captions` is not worth parsing.
    meta = _parse(json_text, needed=not main) if not main or b'"captions"' in json_text else {}
    main = main or next(iter(_texts(meta.get("caption"))), "")
    by_language = meta.get("captions")
    by_language = by_language if isinstance(by_language, dict) else {}
    found = []
    for language in languages:
        found += [main] if language == TEXT_LANGUAGE else []
        found += _texts(by_language.get(language))
    found = [caption for caption in dict.fromkeys(found) if caption]
    return found or ([main] if main else [])


def _texts(value: object) -> list[str]:
    """The captions in a value of the json, which may be of any type."""
    values = value if isinstance(value, list) else [value]
    return [clean(one) for one in values if isinstance(one, str)]


def _parse(json_text: bytes, needed: bool) -> dict:
    """The json's object; {} where it holds none, or cannot be parsed and is not `needed`."""
    if not json_text:
        return {}
    try:
        if len(json_text) > MAX_JSON:
            raise ValueError(f"{len(json_text):,} bytes are more than {MAX_JSON:,}")
        meta = json.loads(json_text.decode("utf-8-sig", errors="replace"))
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
        if needed:
            raise BadSample(f"no caption: there is no .txt, and the .json cannot be parsed: {error}") from error
        return {}
    return meta if isinstance(meta, dict) else {}
