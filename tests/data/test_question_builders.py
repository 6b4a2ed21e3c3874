"""Builders of questions about images: what is true, false and unsure, what is asked, and the public formats."""

import hashlib
import io
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image
from test_language_builders import cldr, entry, pack

from mug.data.builders.openmoji_compositions import Picture, Thing
from mug.data.builders.public_questions import xgqa_samples, xvnli_samples
from mug.data.builders.scene_questions import TEMPLATES, questions_of, scene_question_samples
from mug.data.builders.statements import read_drawings, statement_samples
from mug.data.errors import DataError
from mug.data.left_out import LeftOut

APPLE, GREEN, BANANA = "\U0001f34e", "\U0001f34f", "\U0001f34c"
DOG, CAT, HAND, DARK_HAND = "\U0001f436", "\U0001f431", "\U0001f44b", "\U0001f44b\U0001f3ff"
SUBGROUPS = {APPLE: "food-fruit", GREEN: "food-fruit", BANANA: "food-fruit", DOG: "animal", CAT: "animal", HAND: "hand"}


def digest(samples) -> str:
    found = hashlib.sha256()
    for sample in samples:
        found.update(sample.key.encode() + sample.image + sample.json)
    return found.hexdigest()


# --- Statements ---------------------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path) -> Path:
    english = {
        APPLE: entry("red apple", "fruit", "red", "apple"),
        GREEN: entry("green apple", "fruit", "green", "Apple"),
        BANANA: entry("banana", "fruit", "potassium"),
        DOG: entry("dog face", "pet", "bark"),
        CAT: entry("cat face", "pet", "meow", "red"),
        HAND: entry("waving hand", "wave"),
    }
    german = {
        APPLE: entry("roter Apfel", "Frucht", "rot"),
        DOG: entry("Hund", "Tier", "rot"),
        CAT: entry("Katze", "Tier"),
    }
    folder = cldr(tmp_path / "npm", {"en": english, "de": german}, {"en": {DARK_HAND: entry("dark hand", "wave")}})
    listed = [{"codes": f"{ord(one):X}", "subgroup": subgroup} for one, subgroup in SUBGROUPS.items()]
    pack(folder, "emoji.json-16.0.0", {"emoji.json": json.dumps(listed)})
    return folder


def statements(packages: Path, left_out: LeftOut | None = None, but: str = "") -> dict[str, dict]:
    left_out = LeftOut() if left_out is None else left_out
    samples = statement_samples(read_drawings(packages, left_out), left_out, lambda group: group != but)
    return {sample.key: sample.meta for sample in samples}


def test_statements_are_true_false_or_unsure(packages):
    left_out = LeftOut()
    found = statements(packages, left_out)
    said = defaultdict(set)
    for meta in found.values():
        said[meta["image"], meta["label"]].add(meta["captions"]["en"])
    assert said["1F34E", "true"] < {"fruit", "red", "apple"} and said["1F34C", "true"] <= {"fruit", "potassium"}
    # Neither what is the apple's own, in whatever case, nor what it shares with its siblings.
    assert said["1F34E", "unsure"] <= {"green", "potassium"} and len(said["1F34E", "unsure"]) == 2
    assert said["1F34E", "false"] <= {"pet", "bark", "meow", "wave"}
    assert said["1F436", "unsure"] <= {"meow", "red"}, "a sibling's own"
    assert said["1F436", "false"] <= {"fruit", "apple", "green", "Apple", "potassium", "wave"}, "not `red`: the cat's"
    counts = Counter((meta["image"], meta["label"]) for meta in found.values())
    for image in {meta["image"] for meta in found.values()}:
        assert counts[image, "true"] == counts[image, "false"] == counts[image, "unsure"] > 0
    assert left_out.kinds["further variants of an emoji"] == (1, "'1F44B-1F3FF'")
    assert left_out.kinds["drawings without statements of each kind"] == (1, "'1F44B'"), "a hand without siblings"


def test_in_other_languages_a_statement_is_of_the_same_kind(packages):
    found = statements(packages)
    german = {key: meta["captions"]["de"] for key, meta in found.items() if "de" in meta["captions"]}
    assert {german[key] for key in german if key.startswith("1F34E-true")} == {"Frucht", "rot"}
    # Dog and cat share `Tier`, so the dog has nothing unsure; `rot` is no false statement about the red apple.
    assert not [key for key in german if key.startswith("1F436-unsure")]
    assert {german[key] for key in german if key.startswith("1F34E-false")} <= {"Tier"}


def test_words_and_images_are_of_one_split_and_the_bytes_are_the_same(packages):
    without = statements(packages, but="1F431")
    assert {meta["image"] for meta in without.values()} == {"1F34E", "1F34F", "1F34C"}, "the dog has no sibling"
    assert "meow" not in {meta["captions"]["en"] for meta in without.values()}
    metas = read_drawings(packages, LeftOut())
    one, two = (digest(statement_samples(metas, LeftOut(), lambda group: True)) for _ in range(2))
    assert one == two
    sample = next(statement_samples(metas, LeftOut(), lambda group: True))
    assert sample.image.startswith(b"\x89PNG") and "Unicode-3.0" in sample.meta["license"]


def test_a_damaged_list_of_emoji_is_named(packages):
    pack(packages, "emoji.json-16.0.0", {"emoji.json": '[{"codes": 3}]'})
    with pytest.raises(DataError, match=r"emoji.json of npm package emoji.json is damaged"):
        read_drawings(packages, LeftOut())


# --- Scenes -------------------------------------------------------------------------------------------------


def test_answers_are_what_the_picture_shows():
    two = Picture((Thing("owl", 0, 3, 3), Thing("cake", 4, 3, 3)), "left of", (200, 200, 200))
    assert list(questions_of(two, [0.1, 0.9, 0.7])) == [
        ("exists", "cake", "yes"),
        ("count", "owl", "two"),
        ("what is left of", "cake", "owl"),
        ("which side, left of", "cake", "right"),
    ]
    above = two._replace(relation="above")
    assert list(questions_of(above, [0.6, 0.0, 0.2]))[1:] == [
        ("count", "owl", "two"),
        ("what is above", "cake", "owl"),
        ("which side, above", "owl", "top"),
    ]
    alone = Picture(two.things[:1], "", (200, 200, 200))
    (exists, noun, answer), count = questions_of(alone, [0.6, 0.0, 0.2])
    assert (exists, answer) == ("exists", "no") and noun not in ("owl", "cake") and count == ("count", "owl", "one")


def test_questions_about_scenes(monkeypatch):
    counts = {"train": 30, "held_out": 20}
    monkeypatch.setattr("mug.data.builders.scene_questions.COUNTS", counts)
    found = {split: list(scene_question_samples(lambda key, s=split: key == f"{s}/")) for split in counts}
    for split, samples in found.items():
        assert len({sample.meta["image"] for sample in samples}) == counts[split]
        assert all(sample.key.startswith(f"{split}/") for sample in samples)
        assert all(sample.meta["captions"].keys() == {"en", "de", "fr", "es"} for sample in samples)
    one = next(sample for sample in found["train"] if sample.meta["question"] == "exists")
    before, after = TEMPLATES["exists"]["fr"].split("{}")
    assert one.meta["captions"]["fr"].startswith(before) and one.meta["captions"]["fr"].endswith(after)
    assert "CC BY-SA" in one.meta["license"]
    image = Image.open(io.BytesIO(one.image))
    assert image.size == (one.meta["width"], one.meta["height"])
    assert digest(scene_question_samples(lambda key: key == "held_out/")) == digest(found["held_out"])


# --- Public formats -----------------------------------------------------------------------------------------


def photos(folder: Path, *names: str) -> None:
    (folder / "images").mkdir(parents=True)
    for name in names:
        Image.new("RGB", (9, 9), "red").save(folder / "images" / f"{name}.jpg")


def statement(number: str, text: str, label: str = "neutral", image: str = "11") -> str:
    row = {"gold_label": label, "sentence1": "a caption", "sentence2": text, "pairID": number, "Flikr30kID": image}
    return json.dumps(row) + "\n"


def test_xvnli(tmp_path):
    photos(tmp_path, "11", "12")
    files = {
        "en/train": statement("12.jpg#0r1e", "A dog runs.", "entailment", "12.jpg")
        + statement("12.jpg#0r1n", "No consensus.", "-", "12.jpg")
        + statement("99.jpg#0r1n", "Gone.", image="99.jpg"),
        "en/test": statement("11.jpg#1r1e", "A woman sits.") + statement("11.jpg#1r1c", "It rains.", "contradiction"),
        "ar/test": statement("11.jpg#1r1e", "امرأة جالسة.") + statement("11.jpg#1r1c", "تمطر.", "neutral"),
        "es/test": statement("11.jpg#1r1e", "Una mujer\nestá sentada.") + statement("11.jpg#3", "Solo aquí."),
    }
    for name, text in files.items():
        path = tmp_path / "annotations" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    left_out = LeftOut()
    (train,) = xvnli_samples(tmp_path, left_out, lambda key: key == "train/")
    assert (train.key, train.meta["label"]) == ("train/12_jpg#0r1e", "entailment")
    assert train.meta["captions"] == {"en": "A dog runs."} and train.meta["image"] == "12.jpg"
    held_out = {one.key: one for one in xvnli_samples(tmp_path, left_out, lambda key: key == "held_out/")}
    assert {key: one.meta["captions"] for key, one in held_out.items()} == {
        "held_out/11_jpg#1r1e": {"en": "A woman sits.", "ar": "امرأة جالسة.", "es": "Una mujer está sentada."},
        "held_out/11_jpg#1r1c": {"en": "It rains."},
        "held_out/11_jpg#3": {"es": "Solo aquí."},
    }
    assert held_out["held_out/11_jpg#1r1e"].image == (tmp_path / "images" / "11.jpg").read_bytes()
    assert {kind: count for kind, (count, _) in left_out.kinds.items()} == {
        "questions without a text or an answer": 1,
        "questions whose image is missing": 1,
        "translations with another image or answer": 1,
    }


def test_xgqa(tmp_path):
    photos(tmp_path, "n1", "7")
    question = {"question": "Is it red?", "imageId": "n1", "answer": "yes", "fullAnswer": "Yes, it is."}
    splits = {
        "train_balanced_questions": {
            "05": question | {"imageId": "7", "question": "What is it?", "answer": "snow pants"}
        },
        "testdev_balanced_questions_en": {"20": question},
        "testdev_balanced_questions_de": {"20": question | {"question": "Ist es rot?"}},
    }
    for name, questions in splits.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(questions), encoding="utf-8")
    (train,) = xgqa_samples(tmp_path, LeftOut(), lambda key: key == "train/")
    assert (train.key, train.caption, train.meta["label"]) == ("train/05", "What is it?", "snow pants")
    (held_out,) = xgqa_samples(tmp_path, LeftOut(), lambda key: key == "held_out/")
    assert held_out.meta["captions"] == {"en": "Is it red?", "de": "Ist es rot?"}
    assert held_out.meta["license"] and held_out.meta["attribution"]


def test_public_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"train_balanced_questions.json' cannot be read \(No such file"):
        list(xgqa_samples(tmp_path, LeftOut(), lambda key: key == "train/"))
    with pytest.raises(DataError, match="has no test files"):
        list(xvnli_samples(tmp_path, LeftOut(), lambda key: key == "held_out/"))
    (tmp_path / "train_balanced_questions.json").write_text('{"1": {"question": "?"}}', encoding="utf-8")
    with pytest.raises(DataError, match=r"is damaged \(KeyError\('imageId'\)\)"):
        list(xgqa_samples(tmp_path, LeftOut(), lambda key: key == "train/"))
    for name in ("../secret", "n2"):
        row = {"1": {"question": "?", "imageId": name, "answer": "yes"}}
        (tmp_path / "train_balanced_questions.json").write_text(json.dumps(row), encoding="utf-8")
        left_out = LeftOut()
        assert not list(xgqa_samples(tmp_path, left_out, lambda key: key == "train/")) and left_out.count == 1
