"""Draws what the model sees, reconstructs and writes, as rows of a PNG; and reads it back."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mug.run.common.output import write_png

OLD_COLUMNS = ("original", "masked", "reconstruction")  # of a PNG that does not name them
CELL, GAP, TEXT_WIDTH, HEAD = 128, 8, 360, 28  # pixels
COLUMNS, CAPTIONS = "columns", "captions"  # the PNG's texts that hold them as JSON, to read it back


@dataclass(frozen=True)
class Picture:
    """A row of images, uint8 [3, H, W] by name, and of captions by author.

    words: of the caption "written", each with the image where the model looked for it, uint8 [3, H, W].
    """

    images: dict[str, Tensor]
    captions: dict[str, str]
    words: tuple[tuple[str, Tensor], ...] = ()

    def row(self) -> "Row":
        """Returns the row as it would be read back, its images in their own size."""
        return Row({name: to_image(image) for name, image in self.images.items()}, self.captions)


def draw_grid(pictures: Sequence[Picture], path: Path) -> None:
    """Write a PNG with a row per picture: its images under their names | its captions. All have the same images."""
    columns = list(pictures[0].images)
    width = len(columns) * (CELL + GAP) + TEXT_WIDTH + GAP
    page = Image.new("RGB", (width, HEAD + len(pictures) * (CELL + GAP)), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(14)
    for column, name in enumerate(columns):
        draw.text((GAP + column * (CELL + GAP), 6), name, fill="black", font=font)
    for row, picture in enumerate(pictures):
        y = HEAD + row * (CELL + GAP)
        for column, tensor_CHW in enumerate(picture.images.values()):
            image = to_image(tensor_CHW).resize((CELL, CELL), Image.Resampling.LANCZOS)
            page.paste(image, _corner(row, column))
        lines = [line for author, caption in picture.captions.items() for line in _wrapped(author, caption)]
        draw.multiline_text((2 * GAP + len(columns) * (CELL + GAP), y), "\n".join(lines), fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    text.add_text(COLUMNS, json.dumps(columns))
    text.add_text(CAPTIONS, json.dumps([picture.captions for picture in pictures]))
    write_png(path, page, pnginfo=text)


def to_image(tensor_CHW: Tensor) -> Image.Image:
    """Returns the image of uint8 [3, H, W]."""
    return Image.fromarray(np.ascontiguousarray(tensor_CHW.cpu().numpy().transpose(1, 2, 0)))


@dataclass(frozen=True)
class Row:
    """A row of a grid that was read back: images by name, and captions by author."""

    images: dict[str, Image.Image]
    captions: dict[str, str]


def read_grid(path: Path) -> list[Row]:
    """Returns the rows of a PNG that `draw_grid` wrote. Captions are empty in an old PNG that does not hold them.

    Raises:
        OSError: the image is damaged or cut short.
    """
    with Image.open(path) as page:
        page.load()
        count = (page.height - HEAD) // (CELL + GAP)
        texts = getattr(page, "text", {})
        columns = json.loads(texts.get(COLUMNS, "[]")) or OLD_COLUMNS
        captions = json.loads(texts.get(CAPTIONS, "[]")) or [{}] * count
    corners = [[_corner(row, column) for column in range(len(columns))] for row in range(len(captions))]
    cells = [[page.crop((x, y, x + CELL, y + CELL)) for x, y in row] for row in corners]
    return [
        Row(dict(zip(columns, row, strict=True)), by_author) for row, by_author in zip(cells, captions, strict=True)
    ]


def _corner(row: int, column: int) -> tuple[int, int]:
    """Returns left and top of a cell."""
    return GAP + column * (CELL + GAP), HEAD + row * (CELL + GAP)


def _wrapped(author: str, caption: str) -> list[str]:
    return textwrap.wrap(f"{author}: {caption or '(none)'}", 46, max_lines=2, placeholder=" …")
