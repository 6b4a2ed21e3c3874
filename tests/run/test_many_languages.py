"""Retrieval, captions and translation in several languages: values by hand, and a UniX² that has learned six things."""

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import sacrebleu
import torch
from encoded import one_colour
from evaluation import eval_context, subject_of
from ranks import found_by_ranks
from torch import nn

from mug.data.builders.unigram_training import train_unigram
from mug.data.builders.writers import Sample, write_parquet_shard, write_tar_shard
from mug.data.config import DataConfig, TextConfig
from mug.data.kinds import bitext, image_bitext, pairs
from mug.data.kinds.samples import Shape
from mug.data.tokenizer import Tokenizer
from mug.model.multilingual import MultilingualConfig
from mug.model.objectives.objective import Context, Objective
from mug.model.objectives.unix2 import UniX2
from mug.model.presets import resolve
from mug.run.common.errors import RunError, user_errors
from mug.run.evaluate import process_group
from mug.run.evaluators import bleu
from mug.run.evaluators.captions import CaptionsConfig, WrittenCaptions, score
from mug.run.evaluators.intervals import RESAMPLES, bootstrap, interval
from mug.run.evaluators.retrieval import Retrieval, RetrievalConfig, chance
from mug.run.evaluators.text_retrieval import TextRetrieval, TextRetrievalConfig, nearest
from mug.run.evaluators.translate import OTHER, OWN, WITHOUT, Translate, TranslateConfig
from mug.run.training.recipe import vocabulary_of

pytest.importorskip("sentencepiece")

RED, GREEN, BLUE, YELLOW, PINK, CYAN = (
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 0),
    (255, 0, 255),
    (0, 255, 255),
)
COLOURS = (RED, GREEN, BLUE, YELLOW, PINK, CYAN)
NAMES = {
    "en": ("red", "green", "blue", "yellow", "pink", "cyan"),
    "de": ("rot", "grün", "blau", "gelb", "rosa", "türkis"),
    "zh": ("红", "绿", "蓝", "黄", "粉", "青"),
}
ADJECTIVES = {
    "en": NAMES["en"],
    "de": ("rotes", "grünes", "blaues", "gelbes", "rosa", "türkises"),
    "zh": NAMES["zh"],
}
SENTENCES = {
    "en": "there lies a {} thing",
    "de": "dort liegt ein {} Ding",
    "zh": "这里有{}色的东西",
}
LANGUAGES = tuple(NAMES)
VAGUE = "there it lies"


# --- Values by hand -----------------------------------------------------------------------------------------


class Sees(Objective):
    """Embeds images by their colour and texts by the colour that they name, but takes German blue for yellow."""

    def __init__(self, tokenizer: Tokenizer):
        nn.Module.__init__(self)
        self.tokenizer, self.config = tokenizer, SimpleNamespace(image_size=8, text_length=12)

    def embed_image(self, image_BCHW):
        return nn.functional.normalize(image_BCHW.flatten(2).float().mean(2), dim=1)

    def embed_text(self, tokens_BT):
        return torch.stack([self._embedded(row) for row in tokens_BT])

    embed_sentence = embed_text

    def _embedded(self, row):
        number = int(row[row.tolist().index(self.tokenizer.eos) + 1])
        language = self.tokenizer.languages[self.tokenizer.language_ids.index(number)]  # it follows the end
        place = NAMES[language].index(self.tokenizer.decode(row))
        colour = YELLOW if (language, place) == ("de", 2) else COLOURS[place]
        return nn.functional.normalize(torch.tensor(colour).float(), dim=0)


def named(i: int) -> dict[str, str | list[str]]:
    """Names of a colour; two have none in Chinese, red has two in English."""
    captions = {language: names[i] for language, names in NAMES.items() if language != "zh" or i < 4}
    return captions | {"fr": "couleur"} | ({"en": ["red", "pink"]} if i == 0 else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Shards, and a tokenizer that has no token of French."""
    folder = tmp_path_factory.mktemp("languages")
    texts = [VAGUE, *(name for names in NAMES.values() for name in names)]
    texts += [SENTENCES[one].format(word) for one in LANGUAGES for word in ADJECTIVES[one]]
    train_unigram(texts * 3, 1100, LANGUAGES).save(str(folder / "tokenizer.json"))
    colours = [Sample(f"{i}", one_colour(COLOURS[i]), "png", "", {"captions": named(i)}) for i in range(6)]
    write_tar_shard(folder / "colours.tar", colours)
    write_parquet_shard(
        folder / "texts.parquet",
        [Sample(f"{i}", b"", None, "", {"captions": {**named(i), "en": NAMES["en"][i]}}) for i in range(6)],
    )
    things = [
        {"en": VAGUE} | {one: SENTENCES[one].format(ADJECTIVES[one][i]) for one in ("de", "zh")} for i in range(6)
    ]
    write_tar_shard(
        folder / "things.tar",
        [Sample(f"{i}", one_colour(COLOURS[i]), "png", "", {"captions": some}) for i, some in enumerate(things)],
    )
    return folder


def context_of(folder: Path, **options: object):
    return eval_context(folder, tokenizer=Tokenizer.load(folder / "tokenizer.json"), micro_batch=4, **options)


def work(folder: Path) -> dict:
    """Returns what retrieval finds."""
    context = context_of(folder)
    retrieval = RetrievalConfig(shards=str(folder / "colours.tar"), languages="en,de,zh")
    texts = TextRetrievalConfig(shards=str(folder / "texts.parquet"))
    found = [
        evaluator.run(subject_of(Sees(context.tokenizer)))
        for evaluator in (Retrieval(retrieval, context), TextRetrieval(texts, context))
    ]
    return {"metrics": found[0].metrics | found[1].metrics, "records": found[0].records + found[1].records}


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def found(request, folder) -> dict:
    """What one rank finds, and two."""
    if request.param == 1:
        with patch.dict(os.environ), process_group():
            return json.loads(json.dumps(work(folder)))
    return found_by_ranks(2, work, folder)


def test_images_are_found_in_each_language(found):
    """In German, the name of blue lies at the yellow image, and five others lie nearer to the blue one."""
    german = {"image to text": (4, 5, 6), "text to image": (5, 5, 6)}
    rows = {row["setting"]: row for row in found["records"] if row["method"] == "retrieval"}
    for way, right in german.items():
        for k, count in zip((1, 5, 10), right, strict=True):
            assert rows["de"][f"recall@{k}/{way}"] == pytest.approx(count / 6)
    assert rows["de"]["mean recall"] == found["metrics"]["mean recall/de"] == pytest.approx(31 / 36)
    # "pink" is a name of red, too: the pink image finds its own only after that, and the red text the pink image.
    assert rows["en"]["recall@1/image to text"] == pytest.approx(5 / 6)
    assert rows["en"]["recall@1/text to image"] == pytest.approx(6 / 7)
    assert (rows["en"]["images"], rows["en"]["captions"], rows["zh"]["images"]) == (6, 7, 4)
    assert rows["zh"]["mean recall"] == 1 and rows["zh"]["mean recall/chance"] == pytest.approx((1 / 4 + 2) / 3)
    mean = np.mean([rows[language]["mean recall"] for language in LANGUAGES])
    assert rows["mean over languages"]["mean recall"] == found["metrics"]["mean recall"] == pytest.approx(mean)
    for row in rows.values():
        low, high = row["mean recall interval"]
        assert low <= row["mean recall"] <= high and (low < high) == (row["setting"] != "zh")


def test_translations_are_the_nearest_texts(found):
    rows = {row["setting"]: row for row in found["records"] if row["method"] == "text retrieval"}
    assert rows["de"]["to en"] == found["metrics"]["text retrieval/de to en"] == pytest.approx(5 / 6)
    assert rows["de"]["from en"] == found["metrics"]["text retrieval/en to de"] == pytest.approx(4 / 6)
    assert (rows["zh"]["to en"], rows["zh"]["from en"], rows["zh"]["pairs"]) == (1, 1, 4)
    assert rows["de"]["chance"] == pytest.approx(1 / 6) and "fr" not in rows
    mean = rows["mean over languages"]
    assert mean["to en"] == pytest.approx(11 / 12) and mean["from en"] == pytest.approx(10 / 12)
    assert mean["languages"] == 2 and mean["chance"] == pytest.approx((1 / 6 + 1 / 4) / 2)
    assert mean["from en interval"][0] < mean["from en"] < mean["from en interval"][1] <= 1
    assert rows["de"]["to en interval"] == pytest.approx([0.4365, 0.9699], abs=1e-3)  # Wilson's


def test_candidates_with_the_same_words_are_no_error():
    query, candidate = torch.eye(3), torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]])
    with patch.dict(os.environ), process_group():
        same, chance_same = nearest(query, candidate, ["a", "a", "c"])
        other, chance_other = nearest(query, candidate, ["a", "b", "c"])
    assert same.tolist() == [1, 0, 1] and chance_same.tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    assert other.tolist() == [0, 0, 1] and chance_other.tolist() == pytest.approx([1 / 3] * 3)


def test_chance_is_that_of_random_orders():
    random, captions = np.random.default_rng(0), [2, 1, 1, 1, 3, 1, 1]
    owner, total = np.repeat(np.arange(7), captions), 0.0
    for _ in range(4000):
        places = random.permuted(np.tile(np.arange(10), (7, 1)), axis=1)  # of each caption in an image's order
        by_image = [places[i][owner == i].min() for i in range(7)]
        by_text = random.integers(0, 7, 10)
        total += sum(np.mean(np.array(some) < k) for some in (by_image, by_text) for k in (1, 5, 10)) / 6
    assert chance(captions) == pytest.approx(total / 4000, abs=4e-3)


def test_intervals_are_those_of_resampled_items():
    values = np.random.default_rng(1).random((400, 2))
    means = bootstrap(values) / 400
    assert means.shape == (RESAMPLES, 2)
    low, high = interval(means[:, 0])
    half = 1.96 * values[:, 0].std() / 20
    assert low == pytest.approx(values[:, 0].mean() - half, abs=3e-3)
    assert high == pytest.approx(values[:, 0].mean() + half, abs=3e-3)
    assert np.array_equal(bootstrap(values), bootstrap(values))


# --- BLEU ---------------------------------------------------------------------------------------------------

WRITTEN = ["the cat sat on the mat today", "two dogs run over green fields", "The red car stops at a light"]
TRUE = [
    ["the cat sat on a mat today"],
    ["two dogs run over a green field", "two dogs run"],
    ["the red car stops at it"],
]


def test_bleu_on_resamples_is_sacrebleus_on_these_texts():
    worse = [*WRITTEN[1:], WRITTEN[0]]
    ours = bleu.bootstrapped([WRITTEN, worse], TRUE, "13a")
    random = np.random.default_rng(0)
    for r in range(20):
        drawn = random.integers(0, 3, 3)
        for system, values in zip((WRITTEN, worse), ours, strict=True):
            metric = sacrebleu.BLEU()
            true = [[TRUE[i][0] for i in drawn], [TRUE[i][1] if len(TRUE[i]) > 1 else None for i in drawn]]
            if not any(true[1]):
                true = true[:1]
            expected = metric.corpus_score([system[i] for i in drawn], true).score
            assert values[r] == pytest.approx(expected)


def test_languages_have_sacrebleus_tokenizers():
    assert [bleu.tokenizer_of(one) for one in ("de", "zh", "zh-Hant", "ja")] == ["13a", "zh", "zh", "char"]
    written, true = ["桌子上有一个红色的东西"], [["桌子上有一个蓝色的东西"]]
    scores = score(written, true, lambda line: None, "zh")
    expected = sacrebleu.corpus_bleu(written, [[true[0][0]]], tokenize="zh", lowercase=True).score
    assert scores["BLEU-4"] == pytest.approx(expected) and 40 < expected < 90
    assert score(written, true, lambda line: None)["BLEU-4"] == 0  # one word between spaces
    assert bleu.split("A man's 红色!", "zh") == ["a", "man's", "红", "色", "!"]
    assert (
        bleu.signature(true, "char") == f"nrefs:1|case:mixed|eff:no|tok:char|smooth:exp|version:{sacrebleu.__version__}"
    )


def test_meteor_is_of_english():
    lines = []
    score(["ein Hut"], [["ein Hut"]], lines.append, "de")
    assert "METEOR is left out: it is of English, not de" in lines


# --- A model that has learned six things --------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(folder) -> UniX2:
    """A UniX² that names the colour of the thing in German and Chinese; the English text says nothing of it."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    sizes = {"image_size": 8, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "text_width": 48, "text_heads": 2}
    sizes |= {"text_length": 24, "text_layers": 1, "fusion_layers": 1, "decoder_layers": 1, "embedding_width": 8}
    torch.manual_seed(0)
    model = UniX2(
        resolve(MultilingualConfig(**sizes)), Context(vocabulary=vocabulary_of(tokenizer), losses=("vplm", "mmmt"))
    )
    data = {"shards": str(folder / "things.tar"), "tokenizer": str(folder / "tokenizer.json"), "flip": False}
    data |= {"cache": str(folder / "cache"), "workers": 0, "crop_scale": (1.0, 1.0), "rotate": True}
    kinds = ((image_bitext, "en,de"), (pairs, "de,zh"))
    streams = [kind.open_train(DataConfig(language=of, **data), 0, Shape(8, 24)) for kind, of in kinds]
    optimizer = torch.optim.AdamW(model.parameters(), 6e-3)
    for step in range(240):
        batch, _ = streams[step % 2].batch(range(12 * step, 12 * step + 12))
        losses, _ = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return model.eval()


def test_translations_are_better_with_the_right_image(folder, learned):
    config = TranslateConfig(shards=str(folder / "things.tar"), target="de")
    context = context_of(folder)
    with patch.dict(os.environ), process_group():
        evaluator = Translate(config, context)
        evaluator.check(learned)
        found = evaluator.run(subject_of(learned))
    german = [SENTENCES["de"].format(word) for word in ADJECTIVES["de"]]
    assert [row["source"] for row in found.translations] == [VAGUE] * 6
    assert [row["true"] for row in found.translations] == [[text] for text in german]
    assert [row["written"][OWN] for row in found.translations] == german
    assert [row["written"][OTHER] for row in found.translations] == [*german[3:], *german[:3]]
    (record,) = found.records
    for name in (OWN, WITHOUT, OTHER):
        written = [row["written"][name] for row in found.translations]
        assert record[name] == pytest.approx(sacrebleu.corpus_bleu(written, [german]).score)
        assert record[f"{name}, lower case"] == pytest.approx(
            sacrebleu.corpus_bleu(written, [german], lowercase=True).score
        )
        assert found.metrics[f"translation/{name}"] == record[name]
    assert record[OWN] == pytest.approx(100) and record[OTHER] < 70
    gain, (low, high) = record[f"gain over {OTHER}"], record[f"gain over {OTHER} interval"]
    assert 0 < low <= gain <= high and gain == pytest.approx(record[OWN] - record[OTHER])
    assert record["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|")
    assert record["setting"] == "en to de" and record["method"] == "translation, 4 beams" and record["texts"] == 6


def test_translations_of_the_bitext_that_the_run_holds_out(folder, learned, tmp_path):
    rows = [Sample(f"{i}", b"", None, "", {"captions": {"en": VAGUE, "de": f"Satz {i}"}}) for i in range(3)]
    rows.append(Sample("3", b"", None, "", {"captions": {"en": "alone"}}))
    write_parquet_shard(tmp_path / "texts.parquet", rows)
    config = TextConfig(
        held_out=str(tmp_path / "texts.parquet"),
        shards="x",
        tokenizer=str(folder / "tokenizer.json"),
        language="en,de",
        cache=str(tmp_path),
    )
    context = context_of(folder, open_held_out=lambda: {"texts": bitext.open_held_out(config, Shape(8, 24))})
    with patch.dict(os.environ), process_group():
        found = Translate(TranslateConfig(beams=1), context).run(subject_of(learned))
        texts = TextRetrieval(TextRetrievalConfig(languages="de"), context).run(subject_of(learned))
    assert [(row["key"], list(row["written"])) for row in found.translations] == [(f"{i}", [OWN]) for i in range(3)]
    assert found.metrics.keys() == {"translation/BLEU", "translation/BLEU, lower case"}
    assert texts.records[0]["pairs"] == 3 and texts.records[0]["data"] == "held-out pairs"


def test_another_image_is_the_next_that_differs(folder, learned, tmp_path):
    """Of six rows the fourth has the first one's image, so the first is shown the fifth's."""
    colours = [RED, GREEN, BLUE, RED, YELLOW, PINK]
    texts = [{"en": VAGUE, "de": "Satz"}] * 6
    write_tar_shard(
        tmp_path / "rows.tar",
        [
            Sample(f"{i}", one_colour(c), "png", "", {"captions": t})
            for i, (c, t) in enumerate(zip(colours, texts, strict=True))
        ],
    )
    with patch.dict(os.environ), process_group():
        evaluator = Translate(TranslateConfig(shards=str(tmp_path / "rows.tar")), context_of(folder))
        others = [evaluator._other(pair, 8).number for pair in evaluator.pairs.read(range(6), 8)]
        assert others == [4, 4, 5, 1, 1, 2]
        write_tar_shard(
            tmp_path / "same.tar", [Sample(f"{i}", one_colour(RED), "png", "", {"captions": texts[0]}) for i in (0, 1)]
        )
        with pytest.raises(RunError, match=r"all images of .*same.tar are the same"):
            Translate(TranslateConfig(shards=str(tmp_path / "same.tar")), context_of(folder)).run(subject_of(learned))


def test_mistakes_in_one_line(folder, learned, tmp_path, caplog):
    context, shards = context_of(folder), str(folder / "things.tar")
    for make, said in (
        (
            lambda: Translate(TranslateConfig(shards=shards, target="fr"), context),
            "has fr, but the tokenizer only has tokens",
        ),
        (lambda: Translate(TranslateConfig(), context), "has held out no image_bitext or bitext data; give rows by"),
        (lambda: TranslateConfig(source="de").check(), "source and target are both de"),
        (lambda: Retrieval(RetrievalConfig(shards=shards, languages="de,fr"), context), "retrieval.languages has fr"),
        (lambda: RetrievalConfig(languages="de,").check(), "give languages, as 'en' or 'en,de'"),
        (
            lambda: WrittenCaptions(CaptionsConfig(shards=shards, language="fr"), context),
            "captions.language has fr",
        ),
        (lambda: TextRetrieval(TextRetrievalConfig(), context), "has held out no bitext or image_bitext data"),
        (lambda: Translate(TranslateConfig(shards=shards), context).check(Sees(context.tokenizer)), "that translates"),
    ):
        with pytest.raises(user_errors()) as refused:
            make()
        assert said in str(refused.value) and "\n" not in str(refused.value)
    rows = [Sample(f"{i}", b"", None, "", {"captions": {"en": f"text {i}", "fr": f"texte {i}"}}) for i in range(3)]
    write_parquet_shard(tmp_path / "french.parquet", rows)
    with patch.dict(os.environ), process_group(), pytest.raises(RunError, match="has no pairs of en and a language of"):
        TextRetrieval(TextRetrievalConfig(shards=str(tmp_path / "french.parquet")), context).run(subject_of(learned))


def test_languages_without_a_token_are_counted(folder, caplog):
    context = context_of(folder)
    config = TextRetrievalConfig(shards=str(folder / "texts.parquet"), candidates=3)
    with patch.dict(os.environ), process_group(), caplog.at_level(logging.WARNING, "mug"):
        found = TextRetrieval(config, context).run(subject_of(Sees(context.tokenizer)))
    assert "text retrieval leaves out 1 languages without a token: fr" in caplog.text
    assert [record.get("pairs") for record in found.records] == [3, 3, None]


def test_captions_are_written_in_the_language_that_is_asked_for(folder, learned):
    pairs_of = {"de": [SENTENCES["de"].format(word) for word in ADJECTIVES["de"]]}
    pairs_of["zh"] = [SENTENCES["zh"].format(word) for word in ADJECTIVES["zh"]]
    context = context_of(folder)
    for language, true in pairs_of.items():
        config = CaptionsConfig(shards=str(folder / "things.tar"), language=language)
        with patch.dict(os.environ), process_group():
            found = WrittenCaptions(config, context).run(subject_of(learned))
        assert [row["true"] for row in found.captions] == [[text] for text in true]
        assert [row["written"] for row in found.captions] == true
        assert found.metrics["captions/BLEU-4"] == pytest.approx(100) and found.records[0]["setting"] == language
