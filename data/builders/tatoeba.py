"""Tatoeba's sentences in 112 languages with their English translations, up to 1,000 each (arXiv 1812.10464), as LASER
and XTREME have them: `tatoeba.XXX-eng.XXX` and `tatoeba.XXX-eng.eng`, a sentence a line. For evaluation."""

from collections.abc import Iterator
from pathlib import Path

from mug.data.builders.writers import Sample, text_sample
from mug.data.captions import TEXT_LANGUAGE, clean
from mug.data.errors import DataError
from mug.data.left_out import LeftOut

LICENCE = "CC BY 2.0 FR"
ATTRIBUTION = "Tatoeba (tatoeba.org), as selected for LASER (Artetxe and Schwenk, 2019)"
# ISO 639-3 → the codes of the 36 languages of XTREME; the others keep theirs.
# fmt: off
CODES = {
    "afr": "af", "ara": "ar", "ben": "bn", "bul": "bg", "cmn": "zh", "deu": "de",
    "ell": "el", "est": "et", "eus": "eu", "fin": "fi", "fra": "fr", "heb": "he",
    "hin": "hi", "hun": "hu", "ind": "id", "ita": "it", "jav": "jv", "jpn": "ja",
    "kat": "ka", "kaz": "kk", "kor": "ko", "mal": "ml", "mar": "mr", "nld": "nl",
    "pes": "fa", "por": "pt", "rus": "ru", "spa": "es", "swh": "sw", "tam": "ta",
    "tel": "te", "tgl": "tl", "tha": "th", "tur": "tr", "urd": "ur", "vie": "vi",
}
# fmt: on


def read_tatoeba(source: Path, left_out: LeftOut) -> Iterator[Sample]:
    """Yields the pairs, `captions` in English and in one other language, by language and line.

    source: a folder with the files. Pairs of which a side is empty are counted in `left_out`.

    Raises:
        DataError: there are no files, one has no English, or other lines than the English.
    """
    paths = sorted(path for path in source.glob("tatoeba.*-eng.*") if path.suffix != ".eng") if source.is_dir() else []
    if not paths:
        raise DataError(f"'{source}' has no files tatoeba.XXX-eng.XXX: give the folder of LASER's or XTREME's Tatoeba")
    for path in paths:
        code = path.suffix.removeprefix(".")
        sides = [_lines(path), _lines(path.with_suffix(".eng"))]
        if len(sides[0]) != len(sides[1]):
            raise DataError(f"'{path}' has {len(sides[0]):,} lines, its English file {len(sides[1]):,}: fetch it again")
        for number, (text, english) in enumerate(zip(*sides, strict=True), 1):
            if text and english:
                captions = {TEXT_LANGUAGE: english, CODES.get(code, code): text}
                yield text_sample(f"tatoeba-{code}-{number:04d}", captions, LICENCE, ATTRIBUTION)
            else:
                left_out.add("pairs without one of their texts", f"{number} of '{path}'")


def _lines(path: Path) -> list[str]:
    """Returns the lines, cleaned; only a line feed ends one."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error.strerror}): fetch it again") from error
    return [clean(line) for line in text.removesuffix("\n").split("\n")]
