"""LibreOffice's help in many languages, paragraph by paragraph: paragraphs have the same number in all of them.

apt-get download libreoffice-help-en-us libreoffice-help-de     # then, for each: dpkg-deb -x FILE FOLDER/NAME
"""

from html.parser import HTMLParser
from pathlib import Path

from mug.data.builders.manuals import aligned, manual_folders, page_samples
from mug.data.builders.writers import Sample, key_of
from mug.data.captions import clean
from mug.data.left_out import LeftOut

LICENCE = "MPL-2.0, parts Apache-2.0"
ATTRIBUTION = "LibreOffice help, The Document Foundation and its translators, as packaged by Debian"
INSIDE = "usr/share/libreoffice/help"
PACKAGES = "libreoffice-help-en-us libreoffice-help-de"


class HelpPage(HTMLParser):
    """Collects the paragraphs and headings that have a number: id → text."""

    def __init__(self):
        super().__init__()
        self.paragraphs: dict[str, str] = {}
        self._open: tuple[str, str] | None = None  # tag and id
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        name = dict(attrs).get("id") or ""
        if name.startswith(("par_", "hd_")):
            self._open, self._text = (tag, name), []

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[0] == tag:
            if text := clean("".join(self._text)):
                self.paragraphs.setdefault(self._open[1], text)
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open:
            self._text.append(data)


def read_libreoffice_help(source: Path, left_out: LeftOut) -> list[Sample]:
    """Returns the English paragraphs that have a translation, `captions` in all languages, `page` the first page with
    this English text: a split by pages does not share a text.

    source: a folder with the unpacked packages.

    Raises:
        DataError: there are none in English and another language.
    """
    folders = manual_folders(source, INSIDE, PACKAGES)
    paragraphs = {name: _paragraphs(one) for name, one in folders.items()}
    return page_samples(aligned(paragraphs, left_out), LICENCE, ATTRIBUTION, left_out)


def _paragraphs(folder: Path) -> dict[tuple[str, str], str]:
    """Returns (page, id) → text."""
    found = {}
    for path in sorted((folder / "text").rglob("*.html")):
        page = HelpPage()
        page.feed(path.read_text(encoding="utf-8", errors="replace"))
        page.close()
        name = key_of(path.relative_to(folder / "text"))
        found |= {(name, number): text for number, text in page.paragraphs.items()}
    return found
