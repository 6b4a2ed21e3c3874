"""The shell of the project's HTML pages: one file, no network, light and dark, readable on a phone."""

import base64
import html
import io

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #5f6771; --line: #d8dce1; --back: #fff; --panel: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --faint: #9aa3ad; --line: #3a4048; --back: #14171b; --panel: #1d2126 }
}
* { box-sizing: border-box }
body { font: 16px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem;
  color: var(--ink); background: var(--back) }
article { display: flex; flex-wrap: wrap; gap: .6rem 1rem; padding: .9rem 0; border-top: 1px solid var(--line) }
article > div { display: flex; gap: .6rem } article figure { margin: 0; flex: 0 1 8rem; min-width: 0 }
img { width: 100%; display: block; border: 1px solid var(--line) }
figcaption, dt { color: var(--faint); font-size: .8rem } dl { margin: 0; flex: 1 1 14rem } dd { margin: 0 0 .5rem }
"""


def html_page(title: str, body: str, style: str = "") -> str:
    """One page that needs no other file; `body` and `style` are HTML and CSS, `title` is text."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # or a browser asks a server for one
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style>{body}</html>"
    )


def data_url(image: Image.Image, form: str = "PNG", **options: int) -> str:
    """The image as the text of a `src`; `form` and `options` are Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
