import json

import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

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


@pytest.mark.parametrize("missing", [["[PAD]"], ["[CLS]"], ["[SEP]"], ["[PAD]", "[CLS]", "[SEP]"]])
def test_missing_special_tokens_are_added_and_kept(tmp_path, missing):
    words = ["[PAD]", "[CLS]", "[SEP]", "a"]
    save(tmp_path, [word for word in words if word not in missing])
    loaded = Tokenizer.load(tmp_path)
    new = {"[PAD]": "[PAD]", "[CLS]": "[BOS]", "[SEP]": "[EOS]"}
    assert loaded.added == tuple(new[word] for word in missing)
    assert {loaded.pad, loaded.bos, loaded.eos} <= set(range(loaded.vocab_size)) and loaded.vocab_size == 4
    assert loaded.encode("a a", 6).tolist() == [
        loaded.bos,
        *[loaded.backend.token_to_id("a")] * 2,
        loaded.eos,
        *[loaded.pad] * 2,
    ]
    assert_alone(tmp_path, loaded)


def assert_alone(tmp_path, loaded: Tokenizer) -> None:
    """The text of its tokenizer.json, in a folder of its own as in a checkpoint, gives the same tokenizer."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/tokenizer.json").write_text(loaded.to_json(), encoding="utf-8")
    again = Tokenizer.load(tmp_path / "alone")
    assert (again.pad, again.bos, again.eos, again.mask) == (loaded.pad, loaded.bos, loaded.eos, loaded.mask)
    assert (again.fingerprint, again.to_json(), again.added) == (loaded.fingerprint, loaded.to_json(), ())


# Special tokens and settings as the field's tokenizers have them; the role that each token is to have, "+": added.
FIELD = {
    "CLIP": (
        ["<|startoftext|>", "<|endoftext|>"],
        {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        ("+[PAD]", "<|startoftext|>", "<|endoftext|>", None),
    ),
    "GPT-2": (
        ["<|endoftext|>"],
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        ("+[PAD]", "+[BOS]", "<|endoftext|>", None),
    ),
    "T5": (
        ["<pad>", "</s>", "<unk>"],
        {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        ("<pad>", "+[BOS]", "</s>", None),
    ),
    "Llama-2": (
        ["<unk>", "<s>", "</s>"],
        {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}, "pad_token": None},
        ("+[PAD]", "<s>", "</s>", None),
    ),
    "Llama-3": (
        ["<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"},
        ("<|finetune_right_pad_id|>", "<|begin_of_text|>", "<|eot_id|>", None),
    ),
    "Qwen": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("+[PAD]", "+[BOS]", "<|im_end|>", None),
    ),
    "BERT": (
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"},
        ("[PAD]", "[CLS]", "[SEP]", "[MASK]"),
    ),
    "SigLIP": (
        ["<pad>", "</s>", "<unk>"],
        {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"},
        ("<pad>", "+[BOS]", "</s>", None),
    ),
    "of one's own": (
        ["<blank>", "<start>", "<end>", "<hole>", "[CLS]"],
        {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<blank>", "mask_token": "<hole>"},
        ("<blank>", "<start>", "<end>", "<hole>"),
    ),
}
CAPTIONS = ["a red barn under snow", "two dogs"]


def field_tokenizer(folder, special: list[str]) -> None:
    """A small byte-level BPE, as CLIP, GPT-2, Llama-3 and Qwen have it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CAPTIONS, trainer)
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("settings", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("name", FIELD)
def test_tokenizers_of_the_field(tmp_path, name, settings):
    special, stated, roles = FIELD[name]
    field_tokenizer(tmp_path, special)
    (tmp_path / settings).write_text(json.dumps(stated))
    loaded = Tokenizer.load(tmp_path)
    ids = [None if role is None else loaded.backend.token_to_id(role.removeprefix("+")) for role in roles]
    assert [loaded.pad, loaded.bos, loaded.eos, loaded.mask] == ids
    assert loaded.added == tuple(role[1:] for role in roles if role and role.startswith("+"))
    for caption in CAPTIONS:
        tokens = loaded.encode(caption, 32)
        words = loaded.backend.encode(caption, add_special_tokens=False).ids
        assert tokens.tolist() == [loaded.bos, *words, loaded.eos] + [loaded.pad] * (30 - len(words))
        assert loaded.decode(tokens) == caption
    assert_alone(tmp_path, loaded)


def test_special_tokens_by_option(tmp_path):
    field_tokenizer(tmp_path, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<hole>"])
    loaded = Tokenizer.load(
        tmp_path, {"bos": "<|im_start|>", "pad": "<|endoftext|>", "eos": "<|im_end|>", "mask": "<hole>"}
    )
    assert (loaded.pad, loaded.bos, loaded.eos, loaded.mask, loaded.added) == (0, 1, 2, 3, ())
    assert_alone(tmp_path, loaded)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"end": "<|endoftext|>"}, "has the unknown role 'end': give some of pad, bos, eos, mask"),
        ({"eos": "<|im_end|>"}, r"eos: tokenizer '.*tokenizer.json' has no token '<\|im_end\|>'"),
        ({"eos": "<|endoftext|>", "bos": "<|endoftext|>"}, "all must differ"),
    ],
)
def test_an_option_that_does_not_fit(tmp_path, option, reason):
    field_tokenizer(tmp_path, ["<|endoftext|>"])
    with pytest.raises(DataError, match=reason):
        Tokenizer.load(tmp_path, option)


def test_damaged_settings_are_named(tmp_path):
    field_tokenizer(tmp_path, ["<|endoftext|>"])
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json' cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_name_on_the_hub_with_its_settings(tmp_path, monkeypatch):
    """From the hub's own cache, offline: the settings come with the tokenizer.json."""
    snapshot = tmp_path / "hub/models--some--name/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub/models--some--name/refs").mkdir()
    (tmp_path / "hub/models--some--name/refs/main").write_text("0123")
    special, stated, _ = FIELD["of one's own"]
    field_tokenizer(snapshot, special)
    (snapshot / "tokenizer_config.json").write_text(json.dumps(stated))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded = Tokenizer.load("some/name")
    assert [loaded.pad, loaded.bos, loaded.eos, loaded.mask] == [0, 1, 2, 3]
    with pytest.raises(DataError, match="tokenizer 'other/name' cannot be read"):
        Tokenizer.load("other/name")


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
