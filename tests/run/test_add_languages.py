"""run/add_languages.py: a tokenizer of one language, or of mBART's, learns to tell others apart."""

import pytest
from commands import run_script
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from mug.data.tokenizer import Tokenizer


@pytest.fixture
def roberta(tmp_path):
    """The file of a tokenizer with XLM-R's special tokens, and one of mBART's languages."""
    pieces = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces += [("\u2581a", -1.0), ("\u2581rose", -2.0), ("\u2581", -3.0), ("r", -4.0)]
    backend = Backend(models.Unigram(pieces, unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "de_DE"])
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_languages_without_a_token_get_one_at_the_end(roberta, tmp_path):
    done = run_script("run/add_languages.py", roberta, "--language", "de,en,pt-BR,en", "--out", tmp_path / "new.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/new.json: 12 tokens, the last 2 of en, pt-BR\n"
    old, new = Tokenizer.load(roberta), Tokenizer.load(tmp_path / "new.json")
    assert new.language_tokens == {"de": 9, "en": 10, "pt-BR": 11} and new.mask == 8 and not new.added
    assert old.encode("a rose", 6).tolist() == new.encode("a rose", 6).tolist() == [0, 4, 5, 2, 1, 1]
    assert new.encode("a rose", 6, "en").tolist() == [0, 4, 5, 2, 10, 1]
    assert new.encode_target("a rose", 6, "pt-BR").tolist() == [11, 4, 5, 2, 1, 1]


@pytest.mark.parametrize(
    ("languages", "out", "line"),
    [
        ("de", "new.json", "--language de: {old} has a token for each"),
        ("en,english", "new.json", "'english' is not a language code: give codes such as en, zh or pt-BR"),
        ("en", "tokenizer.json", "--out {old} exists, and runs may use it: choose another file, or remove it first"),
    ],
)
def test_a_mistake_is_one_line(roberta, languages, out, line):
    done = run_script("run/add_languages.py", roberta, "--language", languages, "--out", roberta.with_name(out))
    assert done.returncode == 2 and done.stderr == f"error: {line.format(old=roberta)}\n"
    assert [*roberta.parent.iterdir()] == [roberta]
