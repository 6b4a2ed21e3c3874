import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from mug.data.captions import clean
from mug.data.errors import DataError
from mug.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file) -> Tokenizer:
    return Tokenizer.load(tokenizer_file)


def save(folder, words: list[str]) -> None:
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))


def test_file_and_folder_load_alike(tokenizer_file, tokenizer):
    assert Tokenizer.load(str(tokenizer_file.parent)).fingerprint == tokenizer.fingerprint
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.mask) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == tokenizer.backend.get_vocab_size()


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"], (0, 2, 3, 4)),
        (["<s>", "<pad>", "</s>", "<unk>", "a", "<mask>"], (1, 0, 2, 5)),
        (["a", "<|pad|>", "<|startoftext|>", "<|endoftext|>"], (1, 2, 3, None)),
    ],
)
def test_special_tokens_under_their_usual_names(tmp_path, words, ids):
    save(tmp_path, words)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.pad, loaded.bos, loaded.eos, loaded.mask) == ids


@pytest.mark.parametrize("missing", ["[PAD]", "[CLS]", "[SEP]"])
def test_a_missing_special_token_is_named(tmp_path, missing):
    save(tmp_path, [word for word in ["[PAD]", "[CLS]", "[SEP]", "a"] if word != missing])
    with pytest.raises(DataError, match=r"no (PAD|BOS|EOS) token: add one of .*\[" + missing[1:-1]):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/tokenizer.json", "no such", "nowhere.json"])
def test_a_tokenizer_that_does_not_exist(name):
    with pytest.raises(DataError, match="does not exist"):
        Tokenizer.load(name)


def test_a_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_encode_agrees_with_the_library(tokenizer):
    text = "Picture NUMBER 77"
    expected = tokenizer.backend.encode(text).ids  # its template puts [BOS] and [EOS]
    tokens = tokenizer.encode(text, 20)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == expected + [tokenizer.pad] * (20 - len(expected))
    assert tokenizer.decode(tokens) == "picture number 77"


def test_a_truncated_caption_ends_in_eos(tokenizer):
    whole = tokenizer.encode("picture number 1 picture number 2", 20)
    assert tokenizer.encode("picture number 1 picture number 2", 5).tolist() == [*whole[:4], tokenizer.eos]
    assert tokenizer.encode("picture number", 4).tolist() == tokenizer.encode("picture number 3", 4).tolist()


@pytest.mark.parametrize("caption", ["", b"", " \n", "\0", b"\0\0", "\ud800", "[EOS] [PAD][BOS] [MASK]"])
def test_no_caption_is_all_padding(tokenizer, caption):
    assert tokenizer.encode(clean(caption), 8).tolist() == [tokenizer.pad] * 8
    assert tokenizer.decode(tokenizer.encode(clean(caption), 8)) == ""


def test_a_caption_cannot_spell_special_tokens(tokenizer):
    spelled = tokenizer.encode("picture [EOS] number [MASK] [PAD]", 8)
    assert spelled.tolist() == tokenizer.encode("picture number", 8).tolist()


def test_decode_stops_at_the_first_eos(tokenizer):
    tokens = tokenizer.encode("picture number", 5).tolist()
    assert tokenizer.decode(tokens + tokens) == "picture number"


@given(st.one_of(st.text(), st.binary(), st.text(st.characters(categories=["Cs", "Cc", "Ll"]))), st.integers(3, 40))
def test_any_caption_gives_well_formed_tokens(tokenizer, caption, length):
    tokens = tokenizer.encode(clean(caption), length).tolist()
    assert len(tokens) == length and all(0 <= t < tokenizer.vocab_size for t in tokens)
    if tokens[0] == tokenizer.pad:
        assert set(tokens) == {tokenizer.pad}
    else:
        end = tokens.index(tokenizer.eos)
        assert tokens[0] == tokenizer.bos and set(tokens[end + 1 :]) <= {tokenizer.pad}
        assert end > 1 and not {tokenizer.pad, tokenizer.bos} & set(tokens[1:end])
