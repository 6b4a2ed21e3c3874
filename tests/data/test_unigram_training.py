"""The Unigram tokenizer: what SentencePiece learns, the same each time, and what the loader reads of it."""

import itertools

import pytest

from mug.data.builders.unigram_training import learn_model, train_unigram
from mug.data.errors import DataError
from mug.data.tokenizer import Tokenizer, language_token

sentencepiece = pytest.importorskip("sentencepiece")

NAMES = ["Größere Katze", "a small Cat", "猫の顔", "un Café noir", "العربية", "waving hand: medium skin tone", "हिन्दी"]
TEXTS = [f"{a} {b} {i}" for i, (a, b) in enumerate(itertools.permutations(NAMES, 2))] * 3
UNSEEN = ["Zürich 日本語 हिन्दी 𓀀", "  ", "Katze,Katze!", "e\u0301tude", "a\u00a0b", "🙂"]


@pytest.fixture(scope="module")
def backend():
    return train_unigram(TEXTS, 1200, ("de", "en", "pt-BR"))


@pytest.fixture(scope="module")
def tokenizer(backend, tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("unigram") / "tokenizer.json"
    backend.save(str(path))
    return Tokenizer.load(path)


def test_the_same_texts_give_the_same_bytes(backend):
    assert train_unigram(iter(TEXTS), 1200, ("de", "en", "pt-BR")).to_str() == backend.to_str()
    assert train_unigram(TEXTS[:50], 1200, ("de", "en", "pt-BR")).to_str() != backend.to_str()


def test_its_ids_are_those_of_sentencepiece(backend):
    oracle = sentencepiece.SentencePieceProcessor(model_proto=learn_model(iter(TEXTS), 1200 - 4))
    for text in [*TEXTS, *NAMES, "Zürich 日本語 हिन्दी 𓀀", "Katze,Katze!"]:
        assert backend.encode(text, add_special_tokens=False).ids == oracle.encode(text)


def test_any_text_comes_back_but_for_its_composition(tokenizer):
    for text in [*NAMES, "Zürich 日本語 हिन्दी 𓀀", "Katze,Katze!", "a\u00a0b", "🙂"]:
        assert tokenizer.decode(tokenizer.encode(text, 99)) == text
    assert tokenizer.decode(tokenizer.encode("e\u0301tude", 99)) == "\u00e9tude"


def test_the_loader_reads_the_roles_and_the_languages(tokenizer, tmp_path):
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (0, 1, 2) and tokenizer.added == ()
    assert tokenizer.backend.id_to_token(tokenizer.mask) == "[MASK]"
    assert tokenizer.languages == ("de", "en", "pt-BR") and len(set(tokenizer.language_ids)) == 3
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.language_ids] == ["[de]", "[en]", "[pt-BR]"]
    (tmp_path / "kept.json").write_text(tokenizer.to_json(), encoding="utf-8")
    kept = Tokenizer.load(tmp_path / "kept.json")  # as a checkpoint keeps it
    assert kept.language_tokens == tokenizer.language_tokens and kept.fingerprint == tokenizer.fingerprint


def test_a_tokenizer_without_languages_has_none(tokenizer_file):
    assert Tokenizer.load(tokenizer_file).languages == Tokenizer.load(tokenizer_file).language_ids == ()


def test_the_tokens_of_mbart_are_read(tmp_path, tokenizer_file):
    backend = Tokenizer.load(tokenizer_file).backend
    backend.add_special_tokens(["ar_AR", "cs_CZ", "zh_CN"])
    backend.add_tokens(["it_IT"])  # not special, so a word
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).languages == ("ar", "cs", "zh")


def test_sources_end_with_their_language_and_targets_begin_with_it(tokenizer):
    ids = tokenizer.backend.encode("a small Cat", add_special_tokens=False).ids
    n, en = len(ids), tokenizer.language_tokens["en"]
    assert tokenizer.encode("a small Cat", n + 5, "en").tolist() == [1, *ids, 2, en, 0, 0]
    assert tokenizer.encode_target("a small Cat", n + 4, "en").tolist() == [en, *ids, 2, 0, 0]
    assert tokenizer.encode("a small Cat", n + 2, "en").tolist() == [1, *ids[:-1], 2, en]  # cut to fit
    assert tokenizer.encode_target("a small Cat", n + 1, "en").tolist() == [en, *ids[:-1], 2]
    assert tokenizer.encode("a small Cat", n + 3).tolist() == [1, *ids, 2, 0]
    assert tokenizer.encode("", 5, "en").tolist() == [0] * 5
    for tokens in (tokenizer.encode("a small Cat", 40, "en"), tokenizer.encode("a small Cat", 40)):
        assert tokenizer.decode(tokens) == "a small Cat"


def test_a_text_that_spells_a_language_does_not_get_its_token(tokenizer):
    for tokens in (tokenizer.encode("Cat [de] [EOS] [pt-BR]", 20, "en"), tokenizer.encode("Cat [en] Cat[de]", 20)):
        assert not set(tokens.tolist()) & {tokenizer.language_tokens[one] for one in ("de", "pt-BR")}
    assert tokenizer.encode("[en]", 8, "en").tolist() == [0] * 8  # nothing but the name of a token


@pytest.mark.parametrize("code", ["EN", "english", "e", "en_US", "", "MASK", "en]["])
def test_what_is_not_the_code_of_a_language_is_refused(code):
    with pytest.raises(DataError, match="is not a language code"):
        language_token(code)


def test_mistakes_in_one_line():
    with pytest.raises(DataError, match="a vocabulary of 1025 is too small: give 1026 or more"):
        train_unigram(TEXTS, 1025, ("de",))
    with pytest.raises(DataError, match="no word to learn from"):
        train_unigram(["", " "], 1100)
