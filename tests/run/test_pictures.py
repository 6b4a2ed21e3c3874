"""The pictures of a run: words right and wrong, where the model looked, and the picture for a first look."""

import io

import numpy as np
import pytest
import torch
from evaluation import make_checkpoint
from PIL import Image

from mug.run.evaluators.pictures import draw_rows, spotlight
from mug.run.reporting.grid import Row
from mug.run.reporting.hero import FAINT, RIGHT, WRONG, draw_hero, draw_training, marked
from mug.run.reporting.records import correct_line
from mug.run.state.restore import restore


@pytest.mark.parametrize(
    ("written", "true", "right"),
    [
        ("a cake above an owl", "a cake above an owl", [True] * 5),
        ("A cake left of an owl", "a cake above an owl", [True, True, False, False, True, True]),
        ("an owl above a cake", "a cake above an owl", [True, True, False, False, False]),  # in another order
        ("a fish", "", [None, None]),
        ("", "a fish", []),
    ],
)
def test_words_are_marked(written, true, right):
    assert marked(written, true) == list(zip(written.split(), right, strict=True))


def test_the_share_of_correct_captions_in_words():
    whole = {"correct/captions": 0.888, "correct/nouns": 0.971, "loss/total": 1.0}
    assert correct_line(whole) == "captions entirely correct 88.8%, nouns 97.1%"
    visible = {"correct from the visible patches/captions": 0.5}
    alone = "; from the visible patches alone: captions entirely correct 50.0%"
    assert correct_line(whole | visible) == correct_line(whole) + alone
    assert correct_line({"loss/total": 1.0}) == ""


def test_a_spotlight_is_the_image_where_it_is_looked_at():
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = spotlight(image, torch.tensor([0.0, 0.5, 0.0, 0.0]))
    assert torch.equal(seen[:, :4, 12:], image[:, :4, 12:])  # the upper right patch's corner
    faded = 255 - (255 - image[:, 12:, :4].float()) * 0.15
    assert (seen[:, 12:, :4] - faded).abs().max() <= 0.5


def test_each_written_word_has_its_picture(tmp_path):
    make_checkpoint(tmp_path / "run")
    model, tokenizer, _ = restore(tmp_path / "run", lambda line: None)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = draw_rows(model, tokenizer, images, torch.arange(5), [""] * 5)
    tokens = model.caption(images)
    weights = model.word_attention(images, tokens)
    torch.testing.assert_close(weights[:, 1:].sum(-1) < 1, torch.ones(5, 7, dtype=torch.bool))  # the class token's rest
    for row, image, tokens_T, weights_TN in zip(rows, images, tokens.tolist(), weights, strict=True):
        joined = "".join(word for word, _ in row.words).replace("##", "")
        assert joined == row.captions["written"].replace(" ", "").replace("##", "") and row.words
        first = next(place for place, token in enumerate(tokens_T) if tokenizer.decode([token]))
        if len(row.words) == sum(bool(tokenizer.decode([token])) for token in tokens_T):  # no word of two pieces
            assert torch.equal(row.words[0][1], spotlight(image, weights_TN[first]))


def row_of(colours: tuple[str, ...], written: str) -> Row:
    names = ("original", "masked", "reconstruction")
    images = {name: Image.new("RGB", (64, 64), colour) for name, colour in zip(names, colours, strict=True)}
    return Row(images, {"written": written, "true": "a cake above an owl"})


def colours_of(image: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0).tolist()}


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def test_a_hero_shows_images_and_marks_words():
    rows = [
        row_of(("red", "lime", "blue"), "a cake above an owl"),
        row_of(("black", "cyan", "yellow"), "a cake left of an owl"),
    ]
    hero = draw_hero(rows)
    assert hero.width == 720 and hero.getpixel((0, 0))[3] == 0  # round corners
    for number, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        assert hero.getpixel((24 + 228 * number + 108, 160))[:3] == colour
    right, both = draw_hero(rows[:1]), draw_hero(rows[1:])
    assert rgb(RIGHT) in colours_of(right) and rgb(WRONG) not in colours_of(right)
    assert {rgb(RIGHT), rgb(WRONG), rgb(FAINT)} < colours_of(both)
    assert hero.height > both.height > right.height
    part = draw_hero([row_of(("red", "lime", "blue"), "a cake")])  # each word is right, and three are missing
    assert part.height == both.height and {rgb(RIGHT), rgb(FAINT)} < colours_of(part)
    nothing = draw_hero([row_of(("red", "lime", "blue"), "")])
    assert nothing.height == both.height and rgb(FAINT) in colours_of(nothing)


def test_training_is_a_frame_a_step():
    grids = {step: [row_of(("red", "lime", "blue" if step == 1 else "black"), "an owl")] * 5 for step in (1, 20)}
    moving = Image.open(io.BytesIO(draw_training(grids, "reconstruction")))
    assert (moving.format, moving.n_frames) == ("WEBP", 2)
    for number, shade in enumerate((255, 0)):
        moving.seek(number)
        pixels = np.asarray(moving.convert("RGB")).astype(int)
        assert abs(pixels[300, 100, 2] - shade) < 12 and pixels[100, 100, 1] > 240


def test_long_captions_stay_below_their_own_pictures():
    def frame(caption):
        rows = [row_of(("red", "lime", "blue"), text) for text in (caption, "", "", "")]
        return np.asarray(Image.open(io.BytesIO(draw_training({1: rows}, "reconstruction"))).convert("L"))

    below = slice(24 + 30 + 2 * (159 + 12), None)  # the pictures
    short, long = (frame(caption)[below] < 128 for caption in ("a cake", "a guitar left of a strawberry " * 3))
    assert long.sum() > 3 * short.sum() > 0
    assert not long[:, 24 + 159 + 12 :].any()
