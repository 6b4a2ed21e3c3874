"""The builders of drawings that packages install, on small trees laid out as those packages are."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from encoded import one_colour
from PIL import Image

from mug.data.builders.digits import digit_pairs
from mug.data.builders.drawings import words
from mug.data.builders.gemojione import gemojione_pairs
from mug.data.builders.oxygen import oxygen_pairs
from mug.data.builders.papirus import papirus_pairs
from mug.data.builders.shuffled import shuffled_pairs
from mug.data.builders.wesnoth_pictures import PEOPLES, wesnoth_picture_pairs
from mug.data.builders.wesnoth_units import unit_of, wesnoth_unit_pairs
from mug.data.builders.writers import Sample, write_shards
from mug.data.errors import DataError
from mug.data.left_out import LeftOut


def every(name: str) -> bool:
    return True


def put(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        square = f'<rect width="32" height="64" fill="{colour}"/>'
        path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">{square}</svg>', encoding="utf-8")
    else:
        Image.new("RGB", (8, 8), colour).save(path)


def pixel(sample: Sample, x: int, y: int) -> tuple[int, int, int]:
    return Image.open(io.BytesIO(sample.image)).convert("RGB").getpixel((x, y))


def test_gemojione(tmp_path):
    """Found where dpkg -x puts it; all skin tones of an emoji are one group; categories are labels."""
    folder = tmp_path / "usr/share/rubygems-integration/all/gems/gemojione-3.3.0"
    entries = [("1F44B", "people"), ("1F44B-1F3FD", "people"), ("1F34E", "food"), ("1F3FB", "modifier")]
    index = {}
    for code, category in entries:
        put(folder / "assets/png" / f"{code}.png")
        index[code] = {"unicode": code, "name": f"name of {code}", "category": category, "keywords": ["k"]}
    (folder / "config").mkdir()
    (folder / "config/index.json").write_text(json.dumps(index), encoding="utf-8")
    left_out = LeftOut()
    pairs = list(gemojione_pairs(tmp_path, left_out, every))
    assert [(one.key, one.meta["group"], one.meta["label"]) for one in pairs] == [
        ("1F34E", "1F34E", "food"), ("1F44B", "1F44B", "people"), ("1F44B-1F3FD", "1F44B", "people")
    ]  # fmt: skip
    assert pairs[0].caption == "name of 1F34E" and pairs[0].meta["license"] == "CC BY-SA 4.0"
    assert str(left_out) == "1 drawings of small categories, the first '1F3FB'"
    assert [one.key for one in gemojione_pairs(tmp_path, left_out, lambda group: group == "1F34E")] == ["1F34E"]
    (folder / "assets/png/1F34E.png").unlink()
    with pytest.raises(DataError, match="apt install --reinstall ruby-gemojione"):
        list(gemojione_pairs(folder, left_out, every))


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("elves-wood/archer+female-bow-attack1.png", "elves-wood/archer"),
        ("elves-wood/archer.png", "elves-wood/archer"),
        ("dwarves/gryphon-rider/flying-3.png", "dwarves/gryphon"),
        ("human-magi/arch-mage-idle-2.png", "human-magi/arch"),
    ],
)
def test_the_unit_of_a_picture(path, unit):
    assert unit_of(Path(path)) == unit


def test_wesnoth_splits_by_unit_and_its_captions_name_no_people(tmp_path):
    for people, units in (("orcs", ("archer", "grunt", "slayer", "ruler", "wolf")), ("ogres", ("ogre",))):
        for unit in units:
            for frame in ("", "-attack-1", "+female-die-2"):
                put(tmp_path / "units" / people / f"{unit}{frame}.png")
    left_out = LeftOut()
    pairs = list(wesnoth_unit_pairs(tmp_path, left_out, every))
    assert len(pairs) == 15 and {one.meta["label"] for one in pairs} == {"orcs"} and not any(p.caption for p in pairs)
    assert len({one.meta["group"] for one in pairs}) == 5
    assert left_out.kinds["pictures of peoples with fewer than 5 units"][0] == 3
    grunts = wesnoth_unit_pairs(tmp_path, left_out, lambda unit: unit == "orcs/grunt")
    assert [one.key for one in grunts] == ["orcs/grunt+female-die-2", "orcs/grunt-attack-1", "orcs/grunt"]
    for name in ("items/orcish-flag", "items/axe_small2", "terrain/grass/12", "units/orcs/ruler-x"):
        put(tmp_path / f"{name}.png")
    captions = {one.key: one.caption for one in wesnoth_picture_pairs(tmp_path, left_out, every)}
    assert captions == {"items/axe_small2": "axe small", "terrain/grass/12": ""}, "no unit, no people, no number"
    assert all(PEOPLES.search(name) for name in ("orcs", "elves-wood", "human-magi", "undead-skeletal", "woses"))


def test_icons_are_taken_once_in_their_largest_size(tmp_path):
    for size, colour in (("64x64", "red"), ("48x48", "blue")):
        put(tmp_path / "base" / size / "actions/call-stop.png", colour)
    put(tmp_path / "base/48x48/actions/list-add.png", "blue")
    (tmp_path / "base/64x64/actions/hang-up.png").symlink_to("call-stop.png")
    pairs = {one.caption: one for one in oxygen_pairs(tmp_path, every)}
    assert pairs.keys() == {"call stop", "list add"} and pixel(pairs["call stop"], 0, 0) == (255, 0, 0)
    assert pairs["list add"].meta["label"] == "actions" and pairs["list add"].meta["group"] == "list add"


def test_a_key_of_two_sets_is_kept_apart_when_their_captions_are_shuffled(tmp_path):
    for name in "ab":
        samples = [Sample(f"apps/{i}", one_colour(), "png", f"{name}{i}", {}) for i in range(3)]
        (tmp_path / name).mkdir()
        list(write_shards(samples, tmp_path / name, "train-", "tar", 4))
    shards = f"{tmp_path}/a/train-*.tar {tmp_path}/b/train-*.tar"
    pairs = [*shuffled_pairs(shards, every)]
    assert [one.key for one in pairs] == [*(f"apps/{i}" for i in range(3)), *(f"apps/{i}_2" for i in range(3))]
    assert sorted(one.caption for one in pairs) == [f"{name}{i}" for name in "ab" for i in range(3)]
    assert [one.key for one in shuffled_pairs(shards, "apps/1".__eq__)] == ["apps/1", "apps/1_2"]
    list(write_shards(pairs, tmp_path, "both-", "tar", 6))


def test_vector_icons_are_drawn_on_white(tmp_path):
    put(tmp_path / "64x64/apps/word-pad.svg", "#00ff00")
    (tmp_path / "64x64/apps/write.svg").symlink_to("word-pad.svg")
    (one,) = papirus_pairs(tmp_path, every)
    assert one.caption == "word pad" and pixel(one, 10, 30) == (0, 255, 0) and pixel(one, 50, 30) == (255, 255, 255)


@pytest.mark.parametrize(
    ("pairs", "package"),
    [
        (lambda where: oxygen_pairs(where, every), "oxygen-icon-theme"),
        (lambda where: papirus_pairs(where, every), "papirus-icon-theme"),
        (lambda where: list(gemojione_pairs(where, LeftOut(), every)), "ruby-gemojione"),
        (lambda where: list(wesnoth_unit_pairs(where, LeftOut(), every)), "wesnoth-1.16-data"),
    ],
)
def test_a_missing_package_is_named(pairs, package, tmp_path):
    with pytest.raises(DataError, match=f"apt install {package}"):
        pairs(tmp_path)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    found = load_digits()
    pairs = list(digit_pairs(lambda key: key in ("00003", "01796")))
    assert [one.key for one in pairs] == ["00003", "01796"] and [one.meta["label"] for one in pairs] == ["3", "8"]
    pixels = np.asarray(Image.open(io.BytesIO(pairs[1].image)), dtype=float)
    assert np.abs(255 - pixels - found.images[1796] * 255 / 16).max() <= 0.5


def test_names_as_captions():
    assert [words(name) for name in ("axe_small2", "call-stop", "12", "a.b  c")] == [
        "axe small",
        "call stop",
        "",
        "a b c",
    ]


def test_shuffled_captions_move_together_and_all_of_them(tmp_path):
    samples = [
        Sample(f"{i}", one_colour(), "png", f"c{i}" * (i != 3), {"captions": {"de": f"d{i}"}, "label": f"l{i}"})
        for i in range(6)
    ]
    list(write_shards(samples, tmp_path, "train-", "tar", 4))
    pairs = {one.key: one for one in shuffled_pairs(f"{tmp_path}/train-*.tar", every)}
    assert [*pairs] == [f"{i}" for i in range(6)] and pairs["3"].caption == "", "one without a caption keeps none"
    given = {key: one.caption for key, one in pairs.items() if key != "3"}
    assert sorted(given.values()) == ["c0", "c1", "c2", "c4", "c5"] and all(given[key] != f"c{key}" for key in given)
    assert all(one.meta["captions"]["de"] == one.caption.replace("c", "d") for key, one in pairs.items() if key != "3")
    assert all(one.meta["label"] == f"l{key}" for key, one in pairs.items()), "what is not the caption stays"
    assert given == {p.key: p.caption for p in shuffled_pairs(f"{tmp_path}/train-*.tar", given.__contains__)}
