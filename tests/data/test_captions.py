import json
import re
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from encoded import one_colour
from hypothesis import given
from hypothesis import strategies as st

from mug.data import rng
from mug.data.builders.writers import write_tar
from mug.data.captions import MAX_CHARACTERS, MAX_JSON, SEPARATOR, captions, choose, clean, languages_in, parts
from mug.data.config import DataConfig
from mug.data.errors import BadSample, DataError
from mug.data.kinds.pairs import open_held_out, open_train
from mug.data.kinds.samples import Shape

SHAPE = Shape(image_size=8, text_length=12)
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
    members = []
    for i in range(20):
        meta = {"captions": {"en": [f"picture number {i + 100}"], "de": f"picture number {i + 200}"}}
        members += [(f"{i:02d}.png", one_colour()), (f"{i:02d}.txt", f"picture number {i}".encode())]
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


def test_each_epoch_draws_again_by_seed_and_position(config):
    def train(seed: int):
        return open_train(config, seed, SHAPE)

    pairs = train(3)
    drawn = numbers(pairs, range(600))
    epochs, _, rows = pairs.order.locate(np.arange(600))
    for position, (number, epoch, row) in enumerate(zip(drawn, epochs.tolist(), rows.tolist(), strict=True)):
        kind = int(3 * rng.uniform(3, rng.CAPTION, epoch, position, 1)[0])
        assert number == row + 100 * kind
    counts = Counter(number // 100 for number in drawn)
    assert all(150 < counts[kind] < 250 for kind in range(3))
    assert len({number for number in drawn if number % 100 == 7}) == 3
    assert np.mean(np.array(numbers(train(4), range(200))) // 100 == np.array(drawn[:200]) // 100) < 0.5


def test_evaluation_takes_the_first(config):
    pairs = open_held_out(config, SHAPE)
    assert numbers(pairs, range(20)) == list(range(20))


def test_a_caption_that_cannot_be_had_makes_a_bad_sample(config, tmp_path):
    members = [(f"{i}.png", one_colour()) for i in range(8)] + [("3.json", b"{")]
    write_tar(tmp_path / "shard.tar", members)
    pairs = open_held_out(config, SHAPE)
    batch, replaced = pairs.batch(range(8))
    assert {(entry.position, entry.key) for entry in replaced} == {(3, "3")}
    assert "no caption: there is no .txt" in replaced[0].reason
    assert (batch["tokens"] == pairs.tokenizer.pad).all()


# --- Languages that are wanted ------------------------------------------------------------------------------


def test_languages_in_a_pair():
    assert languages_in(b"A cat.", bytes_of(META)) == {"en", "de", "fr"}
    assert languages_in(b"", bytes_of({"captions": {"de": " ", "fr": ["chat"]}})) == {"fr"}
    assert languages_in(b"", bytes_of({"caption": "a cat"})) == {"en"}
    assert languages_in(b" ", b"{") == set()


def with_german(path, count: int, german: int) -> None:
    """Shards of pairs with English captions, the first ones of which have a German one, too."""
    members = []
    for i in range(count):
        members += [(f"{i:04d}.png", one_colour()), (f"{i:04d}.txt", b"number one")]
        members += [(f"{i:04d}.json", bytes_of({"captions": {"de": "nummer eins"}}))] if i < german else []
    write_tar(path, members)


def open_both(config):
    open_train(config, 0, SHAPE)
    open_held_out(config, SHAPE)


def test_a_wanted_language_that_no_pair_has_is_refused_with_what_there_is(config, caplog):
    for language in ("fr", "fr,it", "DE"):
        wanted = replace(config, language=language)
        message = f"data.language is '{language}', but none of 20 captioned pairs checked (of 20) has a"
        for start in (open_both, lambda wanted: open_held_out(wanted, SHAPE)):
            with pytest.raises(DataError, match=re.escape(message)) as refused:
                start(wanted)
            assert "give languages that they have: de (20), en (20)" in str(refused.value)
    open_both(config)
    open_both(replace(config, language="de"))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("language", "german", "says"),
    [
        ("de", 3, "37 have none of it, and another caption stands in; they have de (3), en (40)"),
        ("en,fr", 3, "0 have none of it, and another caption stands in; they have en (40), fr (0), de (3)"),
        ("de", 38, None),
        ("en,de", 3, None),
    ],
)
def test_few_pairs_of_a_wanted_language_are_counted(language, german, says, config, tmp_path, caplog):
    with_german(tmp_path / "few.tar", 40, german)
    shard = str(tmp_path / "few.tar")
    open_both(replace(config, shards=shard, held_out=shard, language=language))
    assert len(caplog.messages) == (2 if says else 0)
    assert all(says in message for message in caplog.messages)


@pytest.mark.parametrize(
    "written",
    [
        b"\xef\xbb\xbfcaf\xc3\xa9",
        *("caf\u00e9".encode(name) for name in ("utf-8", "utf-16", "utf-32")),
        "\ufeffcaf\u00e9".encode("utf-16-be"),
    ],
)
def test_marked_encodings_are_decoded_and_the_mark_goes(written):
    assert clean(written) == "caf\u00e9"
    assert captions(written, b"", ("en",)) == ["caf\u00e9"]


def test_a_json_in_utf16_is_read():
    assert captions(b"", json.dumps(META).encode("utf-16"), ("de",)) == ["Katze"]


@pytest.mark.parametrize("mark_alone", [b"\xef\xbb\xbf", b"\xff\xfe", b"\xef\xbb\xbf \n", b"", b" \r\n\t"])
def test_a_text_of_nothing_is_no_caption(mark_alone):
    assert captions(mark_alone, b"", ("en",)) == []


def test_several_captions_of_a_text_are_all_to_choose_from():
    assert captions(f"a dog{SEPARATOR} {SEPARATOR}the dog".encode(), b"", ("en",)) == ["a dog", "the dog"]
    assert captions(f"a dog{SEPARATOR}the dog".encode(), b"", ("it",)) == ["a dog", "the dog"]


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"url": "u", "TEXT": "a dog"}, ["a dog"]),
        ({"caption": ["a dog", None, "the dog"]}, ["a dog", "the dog"]),
        ({"caption": "", "Alt_Text": "a dog", "title": "IMG_1"}, ["a dog"]),
        ({"txt": "x", "caption": "a dog"}, ["a dog"]),  # as it was read when other names were not
        ({"captions": ["a dog", "the dog"]}, ["a dog", "the dog"]),
        ({"captions": {"de": "Katze"}, "prompt": "a dog"}, ["a dog"]),
        ({"caption_1": "x", "caption_0": "a dog"}, ["a dog"]),
        ({"caption": {"text": "a dog"}, "width": 3}, []),
    ],
)
def test_usual_names_in_a_json(meta, expected):
    assert captions(b"", bytes_of(meta), ("en",)) == expected


@pytest.mark.parametrize(
    ("text", "languages", "expected"),
    [
        (b'{"parts": {"en": {"nouns": ["owl"]}, "de": {"nouns": ["Eule"]}}}', ("fr", "de", "en"), {"nouns": ["Eule"]}),
        (b'{"parts": {"en": {"nouns": ["owl"]}}}', ("fr",), {}),
        (
            b'{"parts": {"en": {"one": "owl", "n": [1, "", "a  b"]}}}',
            ("en",),
            {"one": ["owl"], "n": ["a b"]},
        ),
        (b'{"parts": ["owl"]}', ("en",), {}),
        (b'{"parts": {"en": ["owl"]}}', ("en",), {}),
        (b'{"key": "parts"}', ("en",), {}),
        (b'{"parts": ', ("en",), {}),
        (b"", ("en",), {}),
    ],
)
def test_parts_of_the_first_language_that_has_some(text, languages, expected):
    assert parts(text, languages) == expected
