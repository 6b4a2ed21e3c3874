"""Questions about images: the values of a batch, a question in many languages, and rows that cannot be used."""

import json
from pathlib import Path

import pytest
import torch
from encoded import one_colour

from mug.data.builders.unigram_training import train_unigram
from mug.data.builders.writers import write_tar
from mug.data.errors import BadSample, DataError
from mug.data.kinds import questions
from mug.data.kinds.samples import Samples, Shape

pytest.importorskip("sentencepiece")
LANGUAGES = ("de", "en", "fr")
WORDS = {"de": "Ist das Nummer", "en": "is this number", "fr": "est-ce le numéro"}
SHAPE = Shape(image_size=16, text_length=24)
LABELS = ("no", "yes")


def asked(language: str, i: int) -> str:
    return f"{WORDS[language]} {i}"


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_unigram((asked(one, i) for i in range(99) for one in LANGUAGES), 1100, LANGUAGES).save(str(path))
    return str(path)


def shard(path: Path, count: int, change: dict[int, dict] | None = None) -> str:
    """Images of one colour, 10 times their number, of which the odd ones are a `yes`; `change` is of their json."""
    members = []
    for i in range(count):
        meta = {"label": LABELS[i % 2], "captions": {one: asked(one, i) for one in LANGUAGES}} | (change or {}).get(
            i, {}
        )
        members += [(f"{i:04d}.json", json.dumps(meta).encode()), (f"{i:04d}.png", one_colour((10 * i,) * 3))]
    write_tar(path, members)
    return str(path)


@pytest.fixture
def options(tmp_path, tokenizer_json) -> dict:
    (tmp_path / "labels.txt").write_text("no\nyes\n", encoding="utf-8")
    own = {"tokenizer": tokenizer_json, "labels": str(tmp_path / "labels.txt"), "cache": str(tmp_path / "cache")}
    return own | {"crop_scale": (1.0, 1.0), "workers": 0}


def test_a_batch_of_questions(tmp_path, options):
    config = questions.Config(shards=shard(tmp_path / "a.tar", 12), **options)
    samples = questions.open_train(config, 5, SHAPE)
    assert isinstance(samples, Samples) and (samples.kind, samples.class_names) == ("questions", LABELS)
    batch, replaced = samples.batch(range(8))
    assert not replaced and batch.kind == "questions"
    assert {name: (x.dtype, tuple(x.shape)) for name, x in batch.items()} == {
        "image": (torch.uint8, (8, 3, 16, 16)),
        "tokens": (torch.int64, (8, 24)),
        "label": (torch.int64, (8,)),
        "position": (torch.int64, (8,)),
    }
    numbers = (batch["image"][:, 0, 0, 0] // 10).tolist()
    assert len(set(numbers)) == 8
    assert [samples.tokenizer.decode(one) for one in batch["tokens"]] == [asked("en", i) for i in numbers]
    assert batch["label"].tolist() == [i % 2 for i in numbers]


def test_several_languages_come_in_turn(tmp_path, options):
    config = questions.Config(shards=shard(tmp_path / "a.tar", 4), language="en,de,fr", **options)
    samples = questions.open_train(config, 5, SHAPE)
    batch, _ = samples.batch(range(12))  # 3 epochs
    said = sorted(samples.tokenizer.decode(one) for one in batch["tokens"])
    assert said == sorted(asked(one, i) for one in LANGUAGES for i in range(4))


def test_a_held_out_question_in_all_of_its_languages(tmp_path, options):
    only_german = {2: {"captions": {"de": "Ist es das?"}, "label": "maybe"}}
    path = shard(tmp_path / "a.tar", 4, only_german)
    samples = questions.open_held_out(questions.Config(shards=path, held_out=path, **options), SHAPE)
    assert samples.order is None
    one = samples.question(3, ("fr", "en"))
    assert (int(one.image[0, 0, 0]), one.label) == (30, 1)
    assert one.tokens.keys() == {"fr", "en"}
    assert one.tokens["fr"].tolist() == samples.tokenizer.encode(asked("fr", 3), 24, "fr").tolist()
    other = samples.question(2, LANGUAGES)
    assert other.tokens.keys() == {"de"} and other.label == -1, "an answer that cannot be given is wrong, not replaced"
    assert samples.question(2, ("en", "fr")).tokens == {}
    assert questions.open_held_out(questions.Config(shards=path, **options), SHAPE) is None


def test_rows_that_cannot_be_learned_from_are_replaced(tmp_path, options):
    change = {1: {"label": "maybe"}, 2: {"label": 3}, 5: {"captions": {"fr": "rien"}}}
    path = shard(tmp_path / "a.tar", 16, change)
    samples = questions.open_train(questions.Config(shards=path, **options), 5, SHAPE)
    batch, replaced = samples.batch(range(16))
    assert {one.key: one.reason for one in replaced} == {
        "0001": "an answer that is not in data.labels",
        "0002": "its json has no text under 'label'",
        "0005": "no text in data.language en",
    }
    assert not {1, 2, 5} & set((batch["image"][:, 0, 0, 0] // 10).tolist())
    held_out = questions.open_held_out(questions.Config(shards=path, held_out=path, **options), SHAPE)
    with pytest.raises(BadSample, match="label"):
        held_out.question(2, LANGUAGES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "data.labels is missing"),
        ("", "is not a list of answers"),
        ("no\nyes\nno\n", "has 'no' twice"),
        ("no\n\nyes\n", "is not a list of answers"),
    ],
)
def test_lists_of_answers_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "labels.txt"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        questions.read_labels(None if text is None else str(path))


def test_answers_in_json(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('["yes", "no"]', encoding="utf-8")
    assert questions.read_labels(str(path)) == ("yes", "no")
    with pytest.raises(DataError, match="cannot be read"):
        questions.read_labels(str(tmp_path / "none.txt"))
    path.write_text('["yes", ', encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        questions.read_labels(str(path))
