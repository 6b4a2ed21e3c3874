import itertools
from collections import Counter

import pytest

from mug.data.builders.tokenizer_training import BASIC_LETTERS, MAX_WORD, SPECIAL_TOKENS, train_tokenizer
from mug.data.errors import DataError
from mug.data.tokenizer import Tokenizer

CAPTIONS = [f"{a} {b}{i}" for i, a in enumerate(["Cat", "dog", "zebra"] * 20) for b in ("grin", "grinning")]


def load(backend, folder) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def test_the_same_captions_give_the_same_bytes_in_any_order():
    trained = [train_tokenizer(order, 600).to_str() for order in (CAPTIONS, CAPTIONS, CAPTIONS[::-1])]
    assert trained[0] == trained[1] == trained[2]
    assert train_tokenizer(CAPTIONS[:10], 600).to_str() != trained[0]


def test_it_loads_with_its_special_tokens_and_gives_captions_back(tmp_path):
    tokenizer = load(train_tokenizer(iter(CAPTIONS), 600), tmp_path)
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.mask) == (0, 1, 2, 3)
    for caption in CAPTIONS:
        assert tokenizer.decode(tokenizer.encode(caption, 20)) == caption.lower()
    tokens = tokenizer.backend.encode("zebra grinning", add_special_tokens=False).tokens
    assert tokens == ["zebra", "grinning"]  # frequent words are one token


def test_the_vocabulary_is_never_larger_than_asked_for():
    words = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=4)]
    backend = train_tokenizer(words, 700)
    assert sorted(backend.get_vocab().values()) == list(range(700))


def test_rare_letters_do_not_crowd_the_words_out():
    """A web crawl holds more distinct characters than a vocabulary has places."""
    rare = [chr(0x4E00 + i) for i in range(5000)]
    backend = train_tokenizer([*rare, *["zebra"] * 10, *["猫"] * 9, *["犬"] * 9], 1024)
    vocabulary = backend.get_vocab()
    letters = [token for token in vocabulary if len(token) == 1]
    assert len(letters) == 1024 // 4 and set(BASIC_LETTERS) < set(letters)
    assert {"zebra", "猫", "犬"} < set(vocabulary)
    assert backend.encode("zebra 猫", add_special_tokens=False).tokens == ["zebra", "猫"]
    assert train_tokenizer(["x", *rare[::-1], *["zebra"] * 10], 1024).to_str() == (
        train_tokenizer(["x", *rare, *["zebra"] * 10], 1024).to_str()
    )


def test_what_wordpiece_cannot_read_teaches_nothing():
    long = "q" * (MAX_WORD + 1)
    backend = train_tokenizer([*CAPTIONS, *[long] * 100], 600)
    assert backend.to_str() == train_tokenizer(CAPTIONS, 600).to_str()
    assert backend.encode(long, add_special_tokens=False).tokens == ["[UNK]"]


def test_captions_are_read_once_and_not_kept():
    alive = Counter()

    class Caption(str):
        def __del__(self):
            alive["now"] -= 1

    def stream():
        for caption in CAPTIONS * 20:
            alive["now"] += 1
            alive["most"] = max(alive["most"], alive["now"])
            yield Caption(caption)

    train_tokenizer(stream(), 600)
    assert alive["most"] < 5


def test_captions_without_words_and_small_vocabularies_are_refused():
    with pytest.raises(DataError, match="no word"):
        train_tokenizer(["", "  "], 600)
    with pytest.raises(DataError, match="511 is too small: give 512"):
        train_tokenizer(CAPTIONS, 511)


def test_special_tokens_come_first():
    vocabulary = train_tokenizer(CAPTIONS, 600).get_vocab()
    assert sorted(vocabulary, key=vocabulary.get)[:5] == SPECIAL_TOKENS
