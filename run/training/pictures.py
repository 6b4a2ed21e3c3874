"""What the model sees, paints and writes, as rows of a PNG."""

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

COLUMNS = ("original", "masked", "reconstruction")
CELL, GAP, TEXT_WIDTH, HEAD = 128, 8, 360, 28  # pixels
CAPTIONS = "captions"  # the PNG's text that holds them as JSON, for who reads it again


@dataclass(frozen=True)
class Sample:
    """One row: uint8 [3, H, W] images, and captions by who wrote them."""

    original: Tensor
    masked: Tensor
    reconstruction: Tensor
    captions: dict[str, str]

    def images(self) -> list[Image.Image]:
        """Original, masked and reconstruction."""
        tensors = (self.original, self.masked, self.reconstruction)
        return [Image.fromarray(np.ascontiguousarray(t.cpu().numpy().transpose(1, 2, 0))) for t in tensors]


def draw_grid(samples: list[Sample], path: Path) -> None:
    """Write a PNG with a row a sample: original | masked | reconstruction | the captions."""
    width = 3 * (CELL + GAP) + TEXT_WIDTH + GAP
    page = Image.new("RGB", (width, HEAD + len(samples) * (CELL + GAP)), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(14)
    for column, name in enumerate(COLUMNS):
        draw.text((GAP + column * (CELL + GAP), 6), name, fill="black", font=font)
    for row, sample in enumerate(samples):
        y = HEAD + row * (CELL + GAP)
        for column, image in enumerate(sample.images()):
            page.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), _corner(row, column))
        lines = [line for author, caption in sample.captions.items() for line in _wrapped(author, caption)]
        draw.multiline_text((2 * GAP + 3 * (CELL + GAP), y), "\n".join(lines), fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    text.add_text(CAPTIONS, json.dumps([sample.captions for sample in samples]))
    page.save(path, pnginfo=text)


def read_grid(path: Path) -> list[tuple[list[Image.Image], dict[str, str]]]:
    """The rows of a PNG that `draw_grid` wrote: the images under COLUMNS, and the captions by who wrote them.

    Captions are empty in a PNG of before they were kept in it.

    Raises:
        OSError: it is not a whole image.
    """
    with Image.open(path) as page:
        page.load()
        count = (page.height - HEAD) // (CELL + GAP)
        captions = json.loads(getattr(page, "text", {}).get(CAPTIONS, "[]")) or [{}] * count
    corners = [[_corner(row, column) for column in range(len(COLUMNS))] for row in range(len(captions))]
    cells = [[page.crop((x, y, x + CELL, y + CELL)) for x, y in row] for row in corners]
    return list(zip(cells, captions, strict=True))


def _corner(row: int, column: int) -> tuple[int, int]:
    """Left and top of a cell."""
    return GAP + column * (CELL + GAP), HEAD + row * (CELL + GAP)


def _wrapped(author: str, caption: str) -> list[str]:
    return textwrap.wrap(f"{author}: {caption or '(none)'}", 46, max_lines=2, placeholder=" …")
