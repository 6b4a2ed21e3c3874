"""GIMP's manual in many languages: its figures with their captions, and its paragraphs.

    apt-get download gimp-help-en gimp-help-de gimp-help-fr         # then, for each: dpkg-deb -x FILE FOLDER/NAME

Pages, figures and paragraphs come in the same order in all languages. The pictures are those of the English manual.
"""

from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

from mug.data.builders.manuals import ENGLISH, aligned, manual_folders, page_samples
from mug.data.builders.writers import Sample, key_of
from mug.data.captions import clean
from mug.data.left_out import LeftOut

LICENCE = "GFDL-1.2-no-invariants-or-later"
ATTRIBUTION = "GIMP user manual, The GIMP Documentation Team, as packaged by Debian"
INSIDE = "usr/share/gimp/2.0/help"
PACKAGES = "gimp-help-en gimp-help-de"

Place = tuple[str, str, int]  # page; path of a picture; how many times it came before


class ManualPage(HTMLParser):
    """Collects a page's pictures, as [source, caption or alternative text], and its paragraphs outside of captions."""

    def __init__(self):
        super().__init__()
        self.figures: list[list[str]] = []
        self.paragraphs: list[str] = []
        self._divs: list[bool] = []  # whether each open one is a caption
        self._text: list[str] | None = None  # of the paragraph or caption that is open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "img":
            self.figures.append([values.get("src", ""), clean(values.get("alt", ""))])
        elif tag == "div":
            self._divs.append(values.get("class") == "caption")
            self._text = [] if self._divs[-1] else self._text
        elif tag == "p" and values.get("class") != "title" and not any(self._divs):
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._divs and self._divs.pop():
            if self.figures and (caption := self._taken()):
                self.figures[-1][1] = caption
        elif tag == "p" and not any(self._divs) and (text := self._taken()):
            self.paragraphs.append(text)

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def _taken(self) -> str:
        text, self._text = clean("".join(self._text or [])), None
        return text


def gimp_help_pairs(figures: list[tuple[Path, dict]], wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields those of the figures whose page is wanted."""
    for path, meta in figures:
        if wanted(meta["page"]):
            yield Sample(meta["key"], path.read_bytes(), path.suffix[1:].lower(), meta["caption"], meta)


def read_gimp_help(source: Path, left_out: LeftOut) -> list[tuple[Path, dict]]:
    """Returns the figures, each a picture and its json: `captions` in the languages that do not say the same as the
    English, `page` the first one that shows the picture, so that a split by pages does not share a picture.

    source: a folder with the unpacked packages.

    Raises:
        DataError: there are none in English and another language.
    """
    folders = manual_folders(source, INSIDE, PACKAGES)
    figures = {language: _figures(_pages(folder), left_out) for language, folder in folders.items()}
    found: list[tuple[Path, dict]] = []
    first: dict[str, str] = {}
    for (page, picture, number), captions in aligned(figures, left_out).items():
        path = folders[ENGLISH] / picture
        if not path.is_file():
            left_out.add("figures without a picture", f"'{picture}' on '{page}'")
            continue
        first.setdefault(picture, page)
        key = f"{page}/{key_of(Path(picture).relative_to('images'))}-{number}"
        caption = captions[ENGLISH]
        meta = {"key": key, "caption": caption, "captions": captions, "page": first[picture]}
        meta |= {"license": LICENCE, "attribution": ATTRIBUTION}
        found.append((path, meta))
    return found


def read_gimp_help_texts(source: Path, left_out: LeftOut) -> list[Sample]:
    """Returns the paragraphs of the pages that have as many of them in English and another language, `captions` in
    these, `page` the first page with this English text.

    Raises:
        DataError: as of `gimp_help_pairs`.
    """
    folders = manual_folders(source, INSIDE, PACKAGES)
    pages = {language: _pages(folder) for language, folder in folders.items()}
    by_language: dict[str, dict[tuple[str, int], str]] = {}
    for language, some in pages.items():
        texts = by_language.setdefault(language, {})
        for name, page in some.items():
            if name in pages[ENGLISH] and len(page.paragraphs) != len(pages[ENGLISH][name].paragraphs):
                left_out.add("pages with other paragraphs than the English", f"'{name}' in '{language}'")
            else:
                texts |= {(name, number): text for number, text in enumerate(page.paragraphs)}
    return page_samples(aligned(by_language, left_out), LICENCE, ATTRIBUTION, left_out)


def _pages(folder: Path) -> dict[str, ManualPage]:
    """Returns name → page, in alphabetical order."""
    found = {}
    for path in sorted(folder.glob("*.html")):
        page = found[key_of(path.relative_to(folder))] = ManualPage()
        page.feed(path.read_text(encoding="utf-8", errors="replace"))
        page.close()
    return found


def _figures(pages: dict[str, ManualPage], left_out: LeftOut) -> dict[Place, str]:
    """Returns the captions, without those of icons for navigation, which lie outside of the folders of pictures."""
    found: dict[Place, str] = {}
    for name, page in pages.items():
        times: dict[str, int] = {}
        for picture, caption in page.figures:
            parts = PurePosixPath(picture).parts
            if len(parts) < 3 or parts[0] != "images" or ".." in parts:
                left_out.add("icons of the manual's own", f"'{picture}'")
                continue
            number = times[picture] = times.get(picture, -1) + 1
            if caption:
                found[name, picture, number] = caption
    return found
