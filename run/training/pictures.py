"""What the model sees, paints and writes, as rows of a PNG."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

COLUMNS = ("original", "masked", "reconstruction")
CELL, GAP, TEXT_WIDTH = 128, 8, 360  # pixels


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
    top = 28
    page = Image.new("RGB", (width, top + len(samples) * (CELL + GAP)), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(14)
    for column, name in enumerate(COLUMNS):
        draw.text((GAP + column * (CELL + GAP), 6), name, fill="black", font=font)
    for row, sample in enumerate(samples):
        y = top + row * (CELL + GAP)
        for column, image in enumerate(sample.images()):
            resized = image.resize((CELL, CELL), Image.Resampling.LANCZOS)
            page.paste(resized, (GAP + column * (CELL + GAP), y))
        lines = [line for author, caption in sample.captions.items() for line in _wrapped(author, caption)]
        draw.multiline_text((2 * GAP + 3 * (CELL + GAP), y), "\n".join(lines), fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def _wrapped(author: str, caption: str) -> list[str]:
    return textwrap.wrap(f"{author}: {caption or '(none)'}", 46, max_lines=2, placeholder=" …")
