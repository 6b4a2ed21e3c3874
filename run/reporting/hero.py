"""The picture of a run for a first look: what was seen, reconstructed and written, large enough for a phone; and its
reconstructions through training, moving. On a light card, so that it reads on dark pages, too."""

import textwrap
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

from PIL import Image, ImageDraw, ImageFont

from mug.data.builders.writers import encoded
from mug.run.reporting.grid import Row

WIDTH, MARGIN, GAP, RADIUS = 720, 24, 12, 20  # pixels
CARD, INK, FAINT, RIGHT, WRONG = "#ffffff", "#1f2328", "#5f6771", "#0a7d33", "#c62828"
TITLES = {"original": "image", "masked": "the encoder sees", "reconstruction": "reconstruction"}
FRAME_MS, LAST_MS = 300, 2500
NOTE = "written from the whole image, not the visible patches; green words are right"
WRITTEN_WIDTH, WRITTEN_LINES = 13, 3  # characters in a line, and lines, of captions below moving pictures


def draw_hero(rows: Sequence[Row]) -> Image.Image:
    """Returns RGBA: for each row its images, and below them the written caption with right and wrong words apart, and
    the true one where it differs; then what was written from. All rows have the same images."""
    names = list(rows[0].images)
    side = (WIDTH - 2 * MARGIN - (len(names) - 1) * GAP) // len(names)
    lines, noted = [_lines(row) for row in rows], any({"written", "true"} <= row.captions.keys() for row in rows)
    height = MARGIN + 36 + sum(side + 12 + 42 * len(few) + 14 for few in lines) + 34 * noted
    card = Image.new("RGBA", (WIDTH, height))
    draw = ImageDraw.Draw(card)
    draw.rounded_rectangle((0, 0, card.width - 1, card.height - 1), RADIUS, fill=CARD)
    lefts = [MARGIN + number * (side + GAP) for number in range(len(names))]
    for left, name in zip(lefts, names, strict=True):
        draw.text((left, MARGIN - 8), TITLES.get(name, name), fill=FAINT, font=_font(24))
    y = MARGIN + 32
    for row, few in zip(rows, lines, strict=True):
        for left, image in zip(lefts, row.images.values(), strict=True):
            card.paste(image.resize((side, side), Image.Resampling.LANCZOS), (left, y))
        y += side + 12
        for words in few:
            _write(draw, y, words)
            y += 42
        y += 14
    if noted:
        draw.text((MARGIN, y), NOTE, fill=FAINT, font=_font(18))
    return card


def _lines(row: Row) -> list[list[tuple[str, str]]]:
    """Returns lines of words with their colours."""
    written, true = row.captions.get("written"), row.captions.get("true", "")
    if written is None:
        return [[(word, INK) for word in true.split()]]
    colours = {True: RIGHT, False: WRONG, None: INK}
    lines = [[(word, colours[mark]) for word, mark in marked(written, true)]]
    same = not true or written.casefold().split() == true.casefold().split()
    return lines if same else [*lines, [(f"true: {true}", FAINT)]]


def _write(draw: ImageDraw.ImageDraw, y: int, words: Sequence[tuple[str, str]]) -> None:
    """Write a line, as large as fits; wrong words underlined."""
    size, x = _fitting(draw, " ".join(word for word, _ in words), WIDTH - 2 * MARGIN), float(MARGIN)
    for word, colour in words:
        draw.text((x, y), word, fill=colour, font=_font(size))
        end = x + draw.textlength(word, _font(size))
        if colour == WRONG:
            draw.line((x, y + size + 5, end, y + size + 5), fill=colour, width=3)
        x = end + draw.textlength(" ", _font(size))


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int) -> int:
    """Returns the largest size, 32 to 12, in which a line is no wider."""
    return next(size for size in range(32, 11, -1) if size == 12 or draw.textlength(text, _font(size)) <= width)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def marked(written: str, true: str) -> list[tuple[str, bool | None]]:
    """Returns the written words, each with whether the true caption has it in the same order; None where there is no
    true caption."""
    words, others = written.split(), true.split()
    if not others:
        return [(word, None) for word in words]
    matcher = SequenceMatcher(None, [word.casefold() for word in words], [word.casefold() for word in others], False)
    right = {block.a + i for block in matcher.get_matching_blocks() for i in range(block.size)}
    return [(word, number in right) for number, word in enumerate(words)]


def draw_training(grids: Mapping[int, Sequence[Row]], painted: str, shown: int = 4) -> bytes:
    """Returns an animated WebP of `shown` pairs: their other images, and below them `painted` at each step."""
    frames, side = [], (WIDTH - 2 * MARGIN - (shown - 1) * GAP) // shown
    for step, rows in grids.items():
        frame = Image.new("RGB", (WIDTH, MARGIN + 30 + 2 * (side + GAP) + 30 * WRITTEN_LINES + 6), CARD)
        draw = ImageDraw.Draw(frame)
        draw.text((MARGIN, MARGIN - 8), f"step {step:,}", fill=INK, font=_font(24))
        for number, row in enumerate(rows[:shown]):
            left, top = MARGIN + number * (side + GAP), MARGIN + 30
            for name in ("masked", painted):
                frame.paste(row.images[name].resize((side, side), Image.Resampling.LANCZOS), (left, top))
                top += side + GAP
            lines = textwrap.wrap(row.captions.get("written", ""), WRITTEN_WIDTH)[:WRITTEN_LINES]
            draw.text((left, top), "\n".join(lines), fill=INK, font=_font(23))
        frames.append(frame)
    times = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=times, loop=0, quality=60)
