import io
import json
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mug.data import rng
from mug.data.captions import MAX_CHARACTERS, MAX_JSON, captions, choose, clean
from mug.data.config import DataConfig
from mug.data.errors import BadSample, DataError
from mug.data.stream import Share, open_held_out, open_train
from mug.data.writers import write_tar

META = {"caption": "a cat", "captions": {"en": ["a cat", "kitten"], "de": "Katze", "fr": ["chat", " ", "chat"]}}


def bytes_of(meta: object) -> bytes:
    return json.dumps(meta).encode()


def test_clean():
    assert clean(b"caf\xc3\xa9 \xff\0 x\n") == "café \ufffd x"
    assert clean("a\ud800b\0c") == "ab c"
    assert len(clean("x" * 10**6)) == len(clean(b"x" * 10**6)) == MAX_CHARACTERS
    assert clean(b"aa" + "\U0001f44b".encode() * 10**5) == "aa" + "\U0001f44b" * (MAX_CHARACTERS - 2)


@pytest.mark.parametrize(
    ("languages", "expected"),
    [
        (("en",), ["A cat.", "a cat", "kitten"]),
        (("de",), ["Katze"]),
        (("fr",), ["chat"]),
        (("de", "en"), ["Katze", "A cat.", "a cat", "kitten"]),
        (("it", "de"), ["Katze"]),  # a language that is missing is skipped
        (("it",), ["A cat."]),  # the .txt stands in
    ],
)
def test_what_there_is_to_choose_from(languages, expected):
    assert captions(b"A cat.\n", bytes_of(META), languages) == expected


def test_the_english_caption_of_the_json_stands_in_for_a_missing_text():
    assert captions(b"", bytes_of({"caption": "a cat"}), ("en",)) == ["a cat"]
    assert captions(b" \0", bytes_of({"caption": "a cat", "captions": {"de": "Katze"}}), ("de",)) == ["Katze"]
    assert captions(b"A cat", bytes_of({"caption": "a dog"}), ("en",)) == ["A cat"]


@pytest.mark.parametrize("pair", [(b"", b""), (b"\0 \n", b"{}"), (b"", b"null"), (b"", bytes_of({"captions": []}))])
def test_a_pair_without_captions_has_none(pair):
    assert choose(*pair, ("en", "de"), 0.7) == ""


@given(st.floats(0, 1, exclude_max=True))
def test_the_draw_cuts_the_captions_into_equal_parts(draw):
    found = captions(b"A cat.", bytes_of(META), ("en", "de"))
    assert (
        choose(b"A cat.", bytes_of(META), ("en", "de"), draw) == found[min(k for k in range(4) if draw < (k + 1) / 4)]
    )


DAMAGED = {
    "cut short": b'{"captions": {"de": "Kat',
    "not json": b'\xff\xfe"captions"',
    "too deep": b'{"captions": ' + b"[" * 100_000,
    "too large": b'{"captions": {"de": "' + b"x" * MAX_JSON + b'"}}',
    "a number of 5,000 digits": b'{"captions": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_json_costs_only_its_own_captions(name):
    assert choose(b"a cat", DAMAGED[name], ("de", "en"), 0.0) == "a cat"
    with pytest.raises(BadSample, match=r"no \.txt, and the \.json cannot be parsed"):
        choose(b"", DAMAGED[name], ("de", "en"), 0.0)


@pytest.mark.parametrize(
    "value", [1, None, True, [], {}, [1, None, {"a": "b"}], {"de": 3}, {"de": None}, {"de": [[["x"]]]}, {"de": [""]}]
)
def test_values_of_other_types_are_no_captions(value):
    assert choose(b"", bytes_of({"caption": 7, "captions": value}), ("de",), 0.0) == ""
    assert choose(b"a cat", bytes_of({"captions": value}), ("de",), 0.0) == "a cat"


def test_nan_lone_surrogates_and_bytes_that_are_not_utf8():
    odd = b'{"similarity": NaN, "width": -Infinity, "captions": {"de": ["Kat\\ud800ze", "\xff\\u0000 Hund"]}}'
    assert captions(b"", odd, ("de",)) == ["Katze", "\ufffd Hund"]
    assert captions(b"", b"\xef\xbb\xbf" + bytes_of(META), ("de",)) == ["Katze"]  # a byte order mark


def test_a_json_that_cannot_matter_is_not_parsed(monkeypatch):
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("parsed"))
    assert choose(b"a cat", b'{"caption": "a cat", "width": 3}', ("en",), 0.0) == "a cat"


def test_ten_megabytes_take_no_time():
    start = time.perf_counter()
    for _ in range(10):
        assert choose(b"word " * 2_000_000, b"", ("en",), 0.0) == ("word " * 2000).strip()
        assert choose(b"a cat", b" " * 10_000_000, ("en",), 0.0) == "a cat"
    assert time.perf_counter() - start < 5  # tokenising them alone takes longer


@given(st.binary(), st.one_of(st.binary(), st.recursive(st.text() | st.floats(), st.lists).map(bytes_of)))
def test_any_bytes_give_clean_text_or_a_bad_sample(text, json_text):
    try:
        caption = choose(text, json_text, ("en", "de"), 0.5)
    except BadSample:
        assert not clean(text)
    else:
        assert caption == clean(caption)


@pytest.mark.parametrize("language", ["", "en,,de", " , "])
def test_no_language_is_refused(language):
    with pytest.raises(DataError, match=r"data\.language"):
        DataConfig(language=language)


@pytest.fixture
def config(tmp_path, tokenizer_file) -> DataConfig:
    """20 pairs "picture number i", which have further captions i + 100 in English and i + 200 in German."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    members = []
    for i in range(20):
        meta = {"captions": {"en": [f"picture number {i + 100}"], "de": f"picture number {i + 200}"}}
        members += [(f"{i:02d}.png", buffer.getvalue()), (f"{i:02d}.txt", f"picture number {i}".encode())]
        members += [(f"{i:02d}.json", bytes_of(meta))]
    write_tar(tmp_path / "shard.tar", members)
    shard = str(tmp_path / "shard.tar")
    options = {"tokenizer": str(tokenizer_file), "cache": str(tmp_path / "cache"), "workers": 0}
    return DataConfig(shards=shard, held_out=shard, language="en, de", **options)


def numbers(pairs, positions) -> list[int]:
    return [
        int(pairs.tokenizer.decode(tokens).replace(" ", "").removeprefix("picturenumber"))
        for tokens in pairs.batch(positions)[0]["tokens"]
    ]


def test_each_epoch_draws_anew_by_seed_and_position(config):
    def train(seed: int):
        return open_train(config, seed, image_size=8, text_length=12, share=Share(4, 4, 0, 1)).pairs

    pairs = train(3)
    drawn = numbers(pairs, range(600))
    epochs, _, rows = pairs.view.order.locate(np.arange(600))
    for position, (number, epoch, row) in enumerate(zip(drawn, epochs.tolist(), rows.tolist(), strict=True)):
        kind = int(3 * rng.uniform(3, rng.CAPTION, epoch, position, 1)[0])
        assert number == row + 100 * kind
    counts = Counter(number // 100 for number in drawn)
    assert all(150 < counts[kind] < 250 for kind in range(3))
    assert len({number for number in drawn if number % 100 == 7}) == 3
    assert np.mean(np.array(numbers(train(4), range(200))) // 100 == np.array(drawn[:200]) // 100) < 0.5


def test_evaluation_takes_the_first(config):
    pairs = open_held_out(config, image_size=8, text_length=12)
    assert numbers(pairs, range(20)) == list(range(20))


def test_a_caption_that_cannot_be_had_makes_a_bad_sample(config, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    members = [(f"{i}.png", buffer.getvalue()) for i in range(8)] + [("3.json", b"{")]
    write_tar(tmp_path / "shard.tar", members)
    pairs = open_held_out(config, image_size=8, text_length=12)
    batch, replaced = pairs.batch(range(8))
    assert {(entry.position, entry.key) for entry in replaced} == {(3, "3")}
    assert "no caption: there is no .txt" in replaced[0].reason
    assert (batch["tokens"] == pairs.tokenizer.pad).all()
