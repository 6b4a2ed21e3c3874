"""The caption of a pair: which ones it has in the wanted languages, which is taken, and its cleaning.

The .txt is the English caption. The .json may hold more, by language: `captions[language]` is a string or a list
of strings. A pair need not have any.
"""

import codecs
import itertools
import json
import re

from mug.data.errors import BadSample

MAX_CHARACTERS = 10_000  # of a caption; far more than any text length, and a bound on the tokenizer's work
MAX_TEXT = 4 * MAX_CHARACTERS  # bytes that are looked at
MAX_JSON = 2**20  # bytes; a json beyond is not parsed
TEXT_LANGUAGE = "en"  # of the .txt
LOST = "\ufffd"  # stands for what could not be decoded
SEPARATOR = "\x1e"  # between the captions of one pair in what stands for its .txt: ASCII's record separator

# Usual names of the caption: columns, keys of a json, extensions in a tar; the first that exists is read. Those
# of MAIN, as they are written here, come before all others: indexes were written by them.
MAIN = ("txt", "caption", "text")
NAMES = (*MAIN, "captions", "numbered", "prompt", "alt_text", "alttext", "alt", "description", "title")
NAMES += ("sentences", "sentence", "raw", "en")
NUMBERED = re.compile(r"(caption|text|prompt|sentence)s?_?0*[01]")  # the first of several: caption_0, text1
# Those that may be a file's extension by themselves, without .txt; `k.raw` may be anything.
TEXT_EXTENSIONS = ("caption", "captions", "text", "prompt", "alt_text", "alt", "description", "title")
# The longer mark comes first: that of UTF-32 begins with that of UTF-16.
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def rank(name: str) -> int | None:
    """Returns the rank of a name among the caption's names, in any case; None for one that is not tried."""
    lower = "numbered" if NUMBERED.fullmatch(name.lower()) else name.lower()
    return NAMES.index(lower) if lower in NAMES else None


def decode(text: bytes) -> str:
    """Returns the text of a file: UTF-8, or by its byte order mark; U+FFFD replaces what cannot be decoded."""
    encoding = next((encoding for mark, encoding in MARKS.items() if text.startswith(mark)), "utf-8-sig")
    return text.decode(encoding, errors="replace")


def clean(caption: str | bytes) -> str:
    """Returns a caption as text that any tokenizer takes: valid UTF-8, no NUL, one line, of bounded length."""
    if isinstance(caption, bytes):
        caption = decode(caption[:MAX_TEXT])
    caption = caption[:MAX_CHARACTERS].encode("utf-8", errors="ignore").decode("utf-8")  # lone surrogates go
    return " ".join(caption.replace("\0", " ").split())


def texts(value: object) -> list[str]:
    """Returns the captions, not cleaned, in a value of any type: text, a list, or an object with a field of text.

    Numbers, booleans and nulls are not captions.
    """
    if isinstance(value, bytes):
        value = decode(value)
    if isinstance(value, str):
        return [value]
    if isinstance(value, list | tuple):
        return [text for one in value for text in texts(one)]
    if isinstance(value, dict):
        names = sorted(
            (name for name in value if rank(str(name)) is not None), key=lambda name: (rank(str(name)), name)
        )
        strings = [name for name, one in value.items() if isinstance(one, str | bytes)]
        names = names or (strings if len(strings) == 1 else [])
        return next((found for name in names if (found := texts(value[name]))), [])
    return []


def choose(text: bytes, json_text: bytes, languages: tuple[str, ...], draw: float) -> str:
    """Returns one of a pair's captions, cleaned; "" where it has none.

    Args:
        text: The .txt, empty where there is none.
        json_text: The .json, likewise.
        languages: What to choose among. Where the pair has a caption in none of them, the .txt is taken.
        draw: In [0, 1). 0 takes the first caption of the first language.

    Raises:
        BadSample: the .txt is missing, and the .json cannot be parsed.
    """
    found = captions(text, json_text, languages)
    return found[int(draw * len(found))] if found else ""


def captions(text: bytes, json_text: bytes, languages: tuple[str, ...]) -> list[str]:
    """Returns what `choose` chooses among: distinct, not empty, in the order of the languages.

    Raises:
        BadSample: the .txt is missing, and the .json cannot be parsed.
    """
    found = by_language(text, json_text, languages)
    return list(dict.fromkeys(itertools.chain.from_iterable(found.values())))


def by_language(
    text: bytes, json_text: bytes, languages: tuple[str, ...], of_text: str = TEXT_LANGUAGE
) -> dict[str, list[str]]:
    """Returns language → its captions, distinct and not empty, in the order of the languages.

    Where the pair has a caption in none of them, those of the .txt, which is in the language `of_text`.

    Raises:
        BadSample: the .txt is missing, and the .json cannot be parsed.
    """
    main = _strings(decode(text[:MAX_TEXT]).split(SEPARATOR))
    # Most pairs have their one caption in the .txt, and a json without `captions` is not worth parsing.
    meta = parse_json(json_text, needed=not main) if not main or b'"captions"' in json_text else {}
    main = main or in_json(meta)
    captions = meta.get("captions")
    captions = captions if isinstance(captions, dict) else {}
    found = {
        language: list(dict.fromkeys([*(main if language == of_text else []), *_strings(captions.get(language))]))
        for language in languages
    }
    return {language: some for language, some in found.items() if some} or ({of_text: main} if main else {})


def parts(json_text: bytes, languages: tuple[str, ...]) -> dict[str, list[str]]:
    """Returns the phrases that a pair's caption is made of, by kind ("nouns"), in the first of the languages that the
    json has them in; {} where it has none.

    `parts[language]` holds them: {"parts": {"en": {"nouns": ["cake", "owl"], "relations": ["above"]}}}.
    """
    by_language = parse_json(json_text, needed=False).get("parts") if b'"parts"' in json_text else None
    by_language = by_language if isinstance(by_language, dict) else {}
    found = next((by_language[one] for one in languages if isinstance(by_language.get(one), dict)), {})
    return {str(kind): _strings(phrases) for kind, phrases in found.items()}


def in_json(meta: dict) -> list[str]:
    """Returns the captions under the first name in a json that holds one: "caption", else in the order of `rank`."""
    names = sorted(
        (name for name in meta if rank(name) is not None), key=lambda name: (name != "caption", rank(name), name)
    )
    return next((found for name in names if (found := _strings(meta[name]))), [])


def _strings(value: object) -> list[str]:
    """Returns the captions in a value of the json, which may be of any type."""
    cleaned = (clean(one) for one in (value if isinstance(value, list) else [value]) if isinstance(one, str))
    return [caption for caption in cleaned if caption]


def parse_json(json_text: bytes, needed: bool) -> dict:
    """Returns the json's object; {} where it holds none, or cannot be parsed and is not `needed`."""
    if not json_text:
        return {}
    try:
        if len(json_text) > MAX_JSON:
            raise ValueError(f"{len(json_text):,} bytes are more than {MAX_JSON:,}")
        meta = json.loads(decode(json_text))
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
        if needed:
            raise BadSample(f"no caption: there is no .txt, and the .json cannot be parsed: {error}") from error
        return {}
    return meta if isinstance(meta, dict) else {}


def languages_in(text: bytes, json_text: bytes) -> set[str]:
    """Returns the languages in which a pair has a caption; arguments as of `choose`."""
    meta = parse_json(json_text, needed=False)
    by_language = meta.get("captions")
    by_language = by_language if isinstance(by_language, dict) else {}
    found = {language for language, value in by_language.items() if _strings(value)}
    main = _strings(decode(text[:MAX_TEXT]).split(SEPARATOR)) or in_json(meta)
    return found | ({TEXT_LANGUAGE} if main else set())
