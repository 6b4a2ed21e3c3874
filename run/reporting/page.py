"""Self-contained HTML pages from the templates next to this file; what they show is escaped."""

import base64

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from mug.data.builders.writers import encoded


def render(template: str, **values: object) -> str:
    """Return the page of a template and these values, which are text unless they are `Markup`."""
    pages = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    pages.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    pages.filters["anchor"] = lambda name: name.lower().replace(" ", "-")
    return pages.get_template(template).render(values)


def data_url(image: Image.Image, form: str = "PNG", **options: int) -> str:
    """Returns the image as the text of a `src`; `form` and `options` are Pillow's."""
    return bytes_url(encoded(image, form, **options), form.lower())


def bytes_url(image: bytes, form: str) -> str:
    """Returns an encoded image as the text of a `src`."""
    return f"data:image/{form};base64,{base64.b64encode(image).decode()}"
