"""A picture of captions in several languages, as SVG: it is drawn with the fonts of whoever looks at it."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from mug.run.reporting.page import data_url, render

WIDTH, MARGIN, GAP, IMAGE = 720, 24, 28, 208  # pixels
LINE, LARGE, SMALL = 46, 20, 14  # pixels of a language, and of its letters: those written, and true ones below
NAME_WIDTH = 64  # pixels of a language's name


@dataclass(frozen=True)
class Captioned:
    """An image, and language → what was written about it; language → its true captions, where it has some."""

    image: Image.Image
    written: Mapping[str, str]
    true: Mapping[str, Sequence[str]]


def draw_languages(pictures: Sequence[Captioned], title: str) -> str:
    """Returns an SVG, on a light card: a row per image with the captions that were written, green where they are true
    but for case, and below each that is not a true one."""
    left, rows, y = MARGIN + IMAGE + GAP, [], MARGIN + 36
    for picture in pictures:
        lines = [
            {
                "language": language,
                "y": y + number * LINE + LARGE,
                "written": _cut(written or "(nothing)", LARGE),
                "right": written.casefold() in {one.casefold() for one in picture.true.get(language, ())},
                "true": _cut(next(iter(picture.true.get(language, ())), ""), SMALL),
            }
            for number, (language, written) in enumerate(picture.written.items())
        ]
        side = picture.image.resize((IMAGE, IMAGE), Image.Resampling.LANCZOS)
        rows.append({"url": data_url(side), "y": y, "lines": lines})
        y += max(IMAGE, LINE * len(lines)) + GAP
    sizes = {"width": WIDTH, "height": y - GAP + MARGIN, "margin": MARGIN, "side": IMAGE, "left": left}
    sizes |= {"text": left + NAME_WIDTH, "large": LARGE, "small": SMALL}
    return render("languages.svg", title=title, rows=rows, **sizes)


def _cut(text: str, size: int) -> str:
    """Returns the text, cut to fit into its line: letters are as wide as they are high, or about half as wide."""
    room, kept = (WIDTH - 2 * MARGIN - IMAGE - GAP - NAME_WIDTH) / size, ""
    for letter in text:
        room -= 1 if unicodedata.east_asian_width(letter) in "WF" else 0.56
        if room < 1:
            return f"{kept}…"
        kept += letter
    return kept
