"""Pictures that compose: what their captions say against where the things are, and the split against leaks."""

import io
import json

import numpy as np
import pytest
import resvg_py
import webdataset
from PIL import Image

from mug.data import rng
from mug.data.builders import openmoji_compositions as compositions
from mug.data.builders.composed_captions import compose_caption
from mug.data.builders.openmoji import drawings
from mug.data.builders.openmoji_compositions import CELL, DRAWS, THINGS, Picture, Thing, build, combinations, compose
from mug.data.config import DataConfig
from mug.data.kinds.pairs import open_held_out, open_train
from mug.data.kinds.samples import Shape
from mug.data.tokenizer import Tokenizer


def random_pictures(count: int, alone_share: float) -> list[Picture]:
    pairs = combinations(held_out=False)
    return [compose(pairs, alone_share, rng.uniform(5, rng.SCENE, 0, number, DRAWS)) for number in range(count)]


def test_captions():
    owl, cake = Thing("owl", 0, 0, 3), Thing("cake", 0, 4, 3)
    assert Picture((owl,), "", ()).caption == "an owl"
    assert Picture((owl, cake), "above", ()).caption == "an owl above a cake"
    assert Picture((cake, owl), "left of", ()).caption == "a cake left of an owl"


def test_the_split_is_by_combination():
    train, held_out = set(combinations(held_out=False)), set(combinations(held_out=True))
    assert not train & held_out and len(train | held_out) == 32 * 31
    assert all(pair[::-1] in held_out for pair in held_out)
    assert 0.08 < len(held_out) / (32 * 31) < 0.12
    partners = [sum(first == thing for first, _ in held_out) for thing in THINGS]
    assert min(partners) >= 2 and max(partners) <= 4


def test_a_picture_is_what_the_draws_decide():
    pairs = [("owl", "cake"), ("bus", "frog")]
    draws = np.array([0, 0.5, 0.999, 0.5, 0.9, 0.9, 0.9, 0.0, 0.99, 0.99, 0.0, 0.0])
    # A bus of 4 cells and a frog of 3, above (0.9): tops 1 of 0..1, and 5; lefts the first of 1..3, and of 2..3.
    expected = (Thing("bus", 1, 1, 4), Thing("frog", 2, 5, 3))
    assert compose(pairs, 0.3, draws) == Picture(expected, "above", (170, 213, 255))
    alone = compose(pairs, 0.6, draws)  # side, left and top are drawn by 0.9, 0.0, 0.99
    assert alone == Picture((Thing(list(THINGS)[28], 0, 2, 6),), "", (170, 213, 255))


def test_captions_say_where_the_things_are():
    pictures = random_pictures(1000, 0.3)
    two = [picture for picture in pictures if picture.relation]
    assert 0.25 < 1 - len(two) / 1000 < 0.35
    for picture in pictures:
        for thing in picture.things:
            assert min(thing.left, thing.top) >= 0 and max(thing.left, thing.top) + thing.side <= 8
    for picture in two:
        first, second = picture.things
        (x, y), (right, down) = ((thing.left + thing.side / 2, thing.top + thing.side / 2) for thing in picture.things)
        across, along = (down - y, right - x) if picture.relation == "left of" else (right - x, down - y)
        assert abs(across) <= along / 2
        ahead = second.left - first.left if picture.relation == "left of" else second.top - first.top
        assert ahead >= first.side, "they overlap"
    assert 0.45 < sum(picture.relation == "above" for picture in two) / len(two) < 0.55


def test_things_are_drawn_where_they_are_on_the_ground():
    picture = Picture((Thing("star", 1, 2, 3), Thing("book", 4, 4, 4)), "left of", (200, 220, 240))
    pixels = np.asarray(compositions.draw(picture)).astype(int)
    away = np.ones((64, 64), bool)
    for thing in picture.things:
        x, y, side = CELL * thing.left, CELL * thing.top, CELL * thing.side
        away[y : y + side, x : x + side] = False
        png = resvg_py.svg_to_bytes(svg_path=str(drawings() / f"{THINGS[thing.noun]}.svg"), width=512, height=512)
        whole = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        left, top, right, bottom = whole.getbbox()  # the larger side of what is drawn fills the box
        large = max(right - left, bottom - top)
        corner = (left + right - large) // 2, (top + bottom - large) // 2
        figure = whole.crop((*corner, corner[0] + large, corner[1] + large)).resize((side, side))
        expected = Image.new("RGB", (side, side), picture.ground)
        expected.paste(figure, (0, 0), figure)
        assert np.abs(pixels[y : y + side, x : x + side] - np.asarray(expected)).mean() < 8
    assert (pixels[away] == picture.ground).all()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(compositions, "COUNTS", {"train": 40, "held_out": 12})
    build(tmp_path)
    return tmp_path


def samples(folder, split: str) -> list[dict]:
    return list(webdataset.WebDataset([str(folder / f"{split}-00000.tar")], shardshuffle=False))


def test_shards_say_what_their_captions_are_made_of(folder):
    train, held_out = (
        [json.loads(sample["json"]) for sample in samples(folder, split)] for split in ("train", "held_out")
    )
    assert (len(train), len(held_out)) == (40, 12)
    assert {len(meta["boxes"]) for meta in train} == {1, 2} and {len(meta["boxes"]) for meta in held_out} == {2}
    pairs = [{frozenset(meta["hexcodes"]) for meta in split} for split in (train, held_out)]
    assert not pairs[0] & pairs[1]
    for meta in [*train, *held_out]:
        nouns, (*relations,) = meta["parts"]["en"]["nouns"], meta["parts"]["en"]["relations"]
        assert [THINGS[noun] for noun in nouns] == meta["hexcodes"] and len(relations) == len(nouns) - 1
        assert meta["caption"] == meta["captions"]["en"]
        left = [word for word in meta["caption"].split() if word not in ("a", "an", "left", "of", "above")]
        assert left == nouns
        assert meta["captions"]["ru"] == ", ".join(meta["parts"]["ru"]["nouns"])
        assert meta["captions"]["fr"] == compose_caption("fr", nouns, "".join(relations)).text
        assert meta["license"] == "CC BY-SA 4.0" and "OpenMoji" in meta["attribution"]
    assert "CC BY-SA 4.0" in (folder / "LICENSE.txt").read_text(encoding="utf-8")
    png = Image.open(io.BytesIO(samples(folder, "held_out")[0]["png"]))
    x, y, side = held_out[0]["boxes"][0]
    assert png.size == (64, 64) and len(np.unique(np.asarray(png)[y : y + side, x : x + side])) > 20


def test_a_build_is_always_the_same(folder, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    build(again)
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_each_noun_is_one_token(folder):
    tokenizer = Tokenizer.load(folder)
    for noun in THINGS:
        assert (tokenizer.encode(f"a {noun}", 8) != tokenizer.pad).sum() == 4  # BOS a noun EOS


def test_it_is_what_training_gets(tmp_path, monkeypatch):
    monkeypatch.setattr(compositions, "COUNTS", {"train": 40, "held_out": 12})
    config = DataConfig(cache=str(tmp_path), embedded="compositions", workers=0)
    train, held_out = open_train(config, 0, Shape(64, 12)), open_held_out(config, Shape(64, 12))
    assert (len(train), len(held_out)) == (40, 12)
    image, tokens = (held_out.batch([3])[0][name][0] for name in ("image", "tokens"))
    (folder,) = tmp_path.glob("compositions-*")
    sample = samples(folder, "held_out")[3]
    pixels = np.asarray(Image.open(io.BytesIO(sample["png"]))).transpose(2, 0, 1)
    assert (image.numpy() == pixels).all()
    assert held_out.tokenizer.decode(tokens[1:].tolist()) == sample["txt"].decode()
