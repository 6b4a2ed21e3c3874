"""The embedded default of kinds that read several languages, built for real."""

import json
from collections import Counter
from pathlib import Path

import emoji
import numpy as np
import pytest

from mug.data.builders.openmoji_languages import VOCABULARY, ensure_languages
from mug.data.builders.unigram_training import train_unigram
from mug.data.config import DataConfig, TextConfig
from mug.data.kinds import bitext, image_bitext, pairs, text
from mug.data.kinds.samples import Shape
from mug.data.reader import Reader
from mug.data.tokenizer import Tokenizer

SHAPE = Shape(image_size=64, text_length=32)
LANGUAGES = sorted(emoji.LANGUAGES)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache() -> Path:
    return TextConfig().cache_folder()


@pytest.fixture(scope="module")
def metas(cache) -> dict[str, list[dict]]:
    """Split → the json of its samples."""
    found = {}
    for split in ("train", "held_out"):
        reader = Reader.open(f"{ensure_languages(cache)}/{split}-*.tar", DataConfig(cache=str(cache)))
        found[split] = [json.loads(reader.read_json(*place)) for place in reader.spread(10**6)]
    return found


def test_an_emoji_and_its_skin_tones_are_on_one_side(metas):
    groups = {split: {meta["group"] for meta in some} for split, some in metas.items()}
    assert ",".join(LANGUAGES) == "ar,de,en,es,fa,fr,id,it,ja,ko,pt,ru,tr,zh"
    assert len(metas["train"]) + len(metas["held_out"]) == 3953 and not groups["train"] & groups["held_out"]
    assert 0.08 < len(groups["held_out"]) / sum(map(len, groups.values())) < 0.12
    assert all(sorted(meta["captions"]) == LANGUAGES for meta in metas["train"][::50])


def test_the_tokenizer_is_of_the_names_to_train_on_to_the_byte(cache, metas):
    folder = ensure_languages(cache)
    names = (meta["captions"][language] for meta in metas["train"] for language in emoji.LANGUAGES)
    assert train_unigram(names, VOCABULARY, tuple(LANGUAGES)).to_str(pretty=True) == (
        folder / "tokenizer.json"
    ).read_text(encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.languages == tuple(LANGUAGES) and tokenizer.mask is not None
    lengths = []
    for meta in metas["held_out"][::5]:
        for language in LANGUAGES:
            tokens = tokenizer.encode(meta["captions"][language], 32, language)
            lengths.append(int((tokens != tokenizer.pad).sum()))
            if lengths[-1] < 32:
                assert tokenizer.decode(tokens) == meta["captions"][language]
    assert np.mean(lengths) < 13 and sum(length == 32 for length in lengths) < 0.01 * len(lengths)


@pytest.mark.parametrize("kind", [text, bitext, image_bitext, pairs])
def test_all_kinds_read_it_without_shards(kind, cache, metas):
    options = {"embedded": "languages"} if kind is pairs else {}
    config = kind.Config(cache=str(cache), language="de,es", workers=0, **options)
    train, held_out = kind.open_train(config, 0, SHAPE), kind.open_held_out(config, SHAPE)
    assert (len(train), len(held_out)) == (len(metas["train"]), len(metas["held_out"]))
    assert train.tokenizer.fingerprint == held_out.tokenizer.fingerprint
    batch, _ = train.batch(range(16))
    names = {meta["captions"][language] for meta in metas["train"] for language in ("de", "es")}
    for tokens in (batch[name] for name in ("tokens", "source", "target") if name in batch):
        assert {train.tokenizer.decode(row) for row in tokens} <= names
    languages = batch["language" if "language" in batch else "source_language"]
    assert Counter(LANGUAGES[number] for number in languages.tolist()).keys() == {"de", "es"}


def test_each_kind_has_its_own_default():
    assert TextConfig().embedded == bitext.Config().embedded == image_bitext.Config().embedded == "languages"
    assert DataConfig().embedded == pairs.Config().embedded == "drawings"
