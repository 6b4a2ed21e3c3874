"""Texts, translations, images with translations: their values, their languages' turns, and what replaces bad rows."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from encoded import one_colour

from mug.data.builders.unigram_training import train_unigram
from mug.data.builders.writers import write_tar
from mug.data.config import DataConfig, TextConfig
from mug.data.errors import DataError
from mug.data.kinds import bitext, image_bitext, pairs, text
from mug.data.kinds.samples import Samples, Shape
from mug.data.loader import load
from mug.data.mixture import StreamConfig, open_stream
from mug.data.order import Order
from mug.data.stream import BatchShard
from mug.data.tokenizer import Tokenizer

LANGUAGES = ("de", "en", "fr")
WORDS = {"de": "Bild Nummer", "en": "picture number", "fr": "image numéro"}
SHAPE = Shape(image_size=16, text_length=24)


def caption(language: str, i: int) -> str:
    return f"{WORDS[language]} {i}"


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_unigram((caption(one, i) for i in range(99) for one in LANGUAGES), 1100, LANGUAGES).save(str(path))
    return str(path)


@pytest.fixture
def options(tmp_path, tokenizer_json) -> dict:
    return {"tokenizer": tokenizer_json, "cache": str(tmp_path / "cache"), "workers": 0, "language": "en,de,fr"}


def row_of(i: int, languages=LANGUAGES) -> dict:
    return {"key": f"{i:04d}", "json": json.dumps({"captions": {one: caption(one, i) for one in languages}})}


def write_parquet(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return str(path)


def read(samples, positions) -> list[dict]:
    batch, replaced = samples.batch(positions)
    assert not replaced and batch.kind == samples.kind
    return [{name: tensor[i] for name, tensor in batch.items()} for i in range(len(positions))]


def test_a_text_in_each_language_in_turn(tmp_path, options):
    config = TextConfig(shards=write_parquet(tmp_path / "a.parquet", [row_of(i) for i in range(12)]), **options)
    samples = text.open_train(config, 5, SHAPE)
    assert isinstance(samples, Samples) and (samples.kind, len(samples), samples.class_names) == ("text", 12, ())
    tokenizer, seen = samples.tokenizer, Counter()
    for one in read(samples, range(36)):  # 3 epochs
        language = LANGUAGES[one["language"]]
        said = tokenizer.decode(one["tokens"])
        assert said in {caption(language, i) for i in range(12)}
        assert one["tokens"].equal(torch.from_numpy(tokenizer.encode(said, 24, language)))
        assert one["tokens"].dtype == one["language"].dtype == torch.int64
        seen[said] += 1
    assert seen == Counter(caption(one, i) for i in range(12) for one in LANGUAGES)  # each once in as many epochs


def test_each_pair_of_languages_of_a_row_once_in_six_epochs(tmp_path, options):
    config = TextConfig(shards=write_parquet(tmp_path / "a.parquet", [row_of(i) for i in range(10)]), **options)
    samples = bitext.open_train(config, 5, SHAPE)
    tokenizer, seen = samples.tokenizer, Counter()
    for one in read(samples, range(60)):
        source, target = LANGUAGES[one["source_language"]], LANGUAGES[one["target_language"]]
        number = int(tokenizer.decode(one["source"]).split()[-1])
        assert one["source"].tolist() == tokenizer.encode(caption(source, number), 24, source).tolist()
        assert one["target"].tolist() == tokenizer.encode_target(caption(target, number), 24, target).tolist()
        seen[number, source, target] += 1
    assert set(seen.values()) == {1} and len(seen) == 10 * 6
    first = [(source, target) for (_, source, target), _ in list(seen.items())[:10]]
    assert len(set(first)) > 2  # not all rows in the same direction


def test_translations_are_evaluated_from_the_first_language_to_the_second(tmp_path, options):
    path = write_parquet(tmp_path / "a.parquet", [row_of(i) for i in range(4)])
    samples = bitext.open_held_out(TextConfig(shards=path, held_out=path, **options), SHAPE)
    batch, _ = samples.batch([2, 0])
    assert [samples.tokenizer.decode(one) for one in batch["source"]] == [caption("en", 2), caption("en", 0)]
    assert [samples.tokenizer.decode(one) for one in batch["target"]] == [caption("de", 2), caption("de", 0)]
    assert samples.order is None
    assert bitext.open_held_out(TextConfig(shards=path, **options), SHAPE) is None


def images(path: Path, count: int, languages=LANGUAGES) -> str:
    """Shard of images of one colour, 10 times their number, each with its captions."""
    members = []
    for i in range(count):
        members.append((f"{i:04d}.png", one_colour((10 * i,) * 3)))
        members.append((f"{i:04d}.json", row_of(i, languages)["json"].encode()))
    write_tar(path, members)
    return str(path)


def test_an_image_with_its_translation(tmp_path, options):
    config = DataConfig(shards=images(tmp_path / "a.tar", 8), **options)
    samples = image_bitext.open_train(config, 5, SHAPE)
    for one in read(samples, range(48)):
        source, target = LANGUAGES[one["source_language"]], LANGUAGES[one["target_language"]]
        number = int(one["image"][0, 0, 0]) // 10
        assert one["image"].dtype == torch.uint8 and one["image"].shape == (3, 16, 16)
        assert source != target and samples.tokenizer.decode(one["source"]) == caption(source, number)
        assert samples.tokenizer.decode(one["target"]) == caption(target, number)


def test_pairs_go_through_their_languages_in_turn(tmp_path, options):
    config = DataConfig(shards=images(tmp_path / "a.tar", 8), rotate=True, **options)
    samples, seen = pairs.open_train(config, 5, SHAPE), Counter()
    for one in read(samples, range(24)):
        language, number = LANGUAGES[one["language"]], int(one["image"][0, 0, 0]) // 10
        assert one["tokens"].tolist() == samples.tokenizer.encode(caption(language, number), 24, language).tolist()
        seen[number, language] += 1
    assert set(seen.values()) == {1} and len(seen) == 24
    drawn = pairs.open_train(DataConfig(shards=config.shards, **options), 5, SHAPE)
    languages = Counter((int(one["image"][0, 0, 0]), int(one["language"])) for one in read(drawn, range(24)))
    assert max(languages.values()) > 1  # independent draws


def test_pairs_of_a_tokenizer_without_languages_have_none(tmp_path, options, tokenizer_file):
    config = DataConfig(shards=images(tmp_path / "a.tar", 8), **options | {"tokenizer": str(tokenizer_file)})
    batch, _ = pairs.open_train(config, 5, SHAPE).batch(range(3))
    assert batch.keys() == {"image", "tokens", "position"}


def test_shards_that_are_named_by_their_language(tmp_path, options):
    """200 texts in one language and 10 in another, of plain text."""
    counts = {"en": 200, "de": 10}
    for language, count in counts.items():
        rows = [{"text": caption(language, i)} for i in range(count)]
        for shard in range(2):
            write_parquet(tmp_path / language / f"{shard}.parquet", rows[shard::2])
    patterns = f"{tmp_path}/{{language}}/*.parquet"
    for exponent in (1.0, 0.3, 0.0):
        config = TextConfig(shards=patterns, exponent=exponent, **options | {"language": "en,de"})
        samples = text.open_train(config, 5, SHAPE)
        share = 10**exponent / (10**exponent + 200**exponent)
        seen: dict[int, list[str]] = defaultdict(list)
        for i, one in enumerate(read(samples, range(420)), 1):
            said = samples.tokenizer.decode(one["tokens"])
            seen[int(one["language"])].append(said)
            assert said.startswith(WORDS[LANGUAGES[one["language"]]])
            assert abs(len(seen[0]) - i * share) < 4
        for number, language in ((0, "de"), (1, "en")):  # of each language all its texts come before one comes again
            texts, n = seen[number], counts[language]
            for start in range(0, len(texts) - n + 1, n):
                assert set(texts[start : start + n]) == {caption(language, i) for i in range(n)}
    assert samples.order.constants() == {"exponent": 0.0, "languages": {"en": 1.0, "de": 1.0}}
    with pytest.raises(DataError, match=r"missing shards: '.*/fr/\*\.parquet'"):
        text.open_train(TextConfig(shards=patterns, **options), 5, SHAPE)


def test_the_same_for_any_workers_and_after_a_seek(tmp_path, options):
    (tmp_path / "x").mkdir()
    path = write_parquet(tmp_path / "a.parquet", [row_of(i) for i in range(20)])
    for kind, module in (("text", text), ("bitext", bitext)):
        samples = module.open_train(TextConfig(shards=path, **options), 5, SHAPE)
        whole, _ = samples.batch(range(30, 70))
        parts = [batch for batch, _ in load(samples, iter([range(30, 45), range(45, 70)]), workers=2)]
        assert all(part.kind == kind for part in parts)
        for name in whole:
            assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))


BAD = {
    "an empty side": {"captions": {"en": "picture", "de": " "}},
    "one language": {"captions": {"en": "picture"}},
    "unknown languages": {"captions": {"en": "picture", "xx": "pict"}},
    "10 MB": {"captions": {"en": "picture " * 1_300_000, "de": "Bild"}},
    "100 kB": {"captions": {"en": "picture " * 13_000, "de": "Bild"}},
    "another type": {"captions": {"en": 7, "de": ["Bild"]}},
}
REASONS = {
    "an empty side": "a text only in en, of data.language en,de,fr",
    "one language": "a text only in en, of data.language en,de,fr",
    "unknown languages": "a text only in en, of data.language en,de,fr",
    "10 MB": "no caption: there is no .txt, and the .json cannot be parsed: 10,400,038 bytes are more than 1,048,576",
    "100 kB": "a side of 9,999 characters or more, too long for a sentence",
    "another type": "a text only in de, of data.language en,de,fr",
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_translations_are_replaced_and_nothing_else_moves(tmp_path, options, bad):
    rows = [row_of(i) for i in range(12)]
    good = bitext.open_train(TextConfig(shards=write_parquet(tmp_path / "a" / "a.parquet", rows), **options), 5, SHAPE)
    rows[4]["json"] = json.dumps(BAD[bad])
    path = write_parquet(tmp_path / "b" / "a.parquet", rows)
    mixed = bitext.open_train(TextConfig(shards=path, **options), 5, SHAPE)
    (expected, _), (batch, replaced) = good.batch(range(12)), mixed.batch(range(12))
    (one,) = [one for one in replaced if one.key == "0004"]
    assert (one.reason, one.shard, one.shard_samples, one.epoch) == (REASONS[bad], path, 12, 0)
    assert good.tokenizer.decode(expected["source"][one.position]).endswith(" 4")
    for i in range(12):
        assert expected["source"][i].equal(batch["source"][i]) == (i != one.position)
    again, replaced_again = mixed.batch(range(12))
    assert replaced_again == replaced and all(torch.equal(again[name], batch[name]) for name in batch)


def test_texts_in_no_wanted_language_are_replaced(tmp_path, options):
    rows = [row_of(i) for i in range(12)]
    rows[3]["json"] = json.dumps({"captions": {"xx": "nothing"}})
    samples = text.open_train(TextConfig(shards=write_parquet(tmp_path / "a.parquet", rows), **options), 5, SHAPE)
    batch, replaced = samples.batch(range(12))
    assert [(one.key, one.reason) for one in replaced] == [("0003", "no text in data.language en,de,fr")]
    assert all(samples.tokenizer.decode(tokens) for tokens in batch["tokens"])


def test_a_mixture_of_all_kinds(tmp_path, options):
    table, shard = write_parquet(tmp_path / "a.parquet", [row_of(i) for i in range(20)]), images(tmp_path / "a.tar", 8)
    streams = {
        "cc100": StreamConfig(TextConfig(shards=table, **options), "text", 1),
        "opus": StreamConfig(TextConfig(shards=table, **options), "bitext", 1),
        "wit": StreamConfig(DataConfig(shards=shard, **options), "pairs", 1),
        "cc3m": StreamConfig(DataConfig(shards=shard, **options), "image_bitext", 1),
    }
    stream = open_stream(streams, 3, SHAPE, BatchShard(16, 4, 0, 1, groups=4))
    steps = iter(stream)
    kinds = Counter(batch.kind for _ in range(8) for batch in next(steps))
    assert kinds.keys() == {"text", "bitext", "pairs", "image_bitext"} and set(kinds.values()) <= {7, 8, 9}
    assert isinstance(stream.source.tokenizer, Tokenizer)


def test_mistakes_in_one_line(tmp_path, options, tokenizer_file):
    table, shard = write_parquet(tmp_path / "a.parquet", [row_of(i) for i in range(5)]), images(tmp_path / "a.tar", 3)
    mistakes = [
        (text, TextConfig(shards=table, **options | {"language": "en,xx"}), "data.language has xx, .* it has de,en,fr"),
        (text, TextConfig(shards=table, **options | {"tokenizer": str(tokenizer_file)}), "no language tokens"),
        (text, TextConfig(shards=table, text_length=99, **options), "data.text_length 99 is more than model.* 24"),
        (bitext, TextConfig(shards=table, **options | {"language": "en"}), "give two languages or more"),
        (pairs, DataConfig(shards=table, **options), r"no images in 1 shards, '.*a\.parquet' the first, which has"),
        (image_bitext, DataConfig(shards=table, **options), "no images in 1 shards"),
    ]
    for module, config, reason in mistakes:
        with pytest.raises(DataError, match=reason):
            module.open_train(config, 0, SHAPE)
    with pytest.raises(DataError, match="reads no texts"):
        text.open_train(TextConfig(shards=table, **options), 0, Shape(16))
    with pytest.raises(DataError, match="leaves no token between BOS and EOS: give 4 or more"):
        pairs.open_train(DataConfig(shards=shard, text_length=3, **options), 0, SHAPE)
    with pytest.raises(DataError, match=r"data\.exponent is 1\.5: give 0 to 1"):
        TextConfig(exponent=1.5)


def test_a_shorter_text_length_of_one_stream(tmp_path, options):
    table = write_parquet(tmp_path / "a.parquet", [row_of(i) for i in range(5)])
    samples = text.open_train(TextConfig(shards=table, text_length=7, **options), 0, SHAPE)
    batch, _ = samples.batch(range(5))
    assert batch["tokens"].shape == (5, 7) and isinstance(samples.order, Order)
