"""Answers to held-out questions: accuracies by language, on one rank and shared by three."""

import json
from pathlib import Path

import pytest
import torch
from encoded import one_colour
from evaluation import eval_context, subject_of
from ranks import found_by_ranks
from torch import nn

from mug.data.builders.unigram_training import train_unigram
from mug.data.builders.writers import write_tar
from mug.data.kinds import questions
from mug.data.kinds.samples import Shape
from mug.data.tokenizer import Tokenizer
from mug.run.common.errors import RunError
from mug.run.evaluators.answers import Answers, AnswersConfig

pytest.importorskip("sentencepiece")
LANGUAGES = ("de", "en", "fr")
COUNT = 20


class Brightness(nn.Module):
    """Tells whether the image's number is odd; asked in French, whether it is even."""

    def __init__(self, french: int):
        super().__init__()
        self.french = french

    def answer(self, image_BCHW: torch.Tensor, tokens_ST: torch.Tensor) -> torch.Tensor:
        number_S = (image_BCHW[:, 0, 0, 0] // 10).repeat(len(tokens_ST) // len(image_BCHW))
        return nn.functional.one_hot((number_S + (tokens_ST == self.french).any(1)).long() % 2, 2).float()


def write_questions(folder: Path) -> None:
    """20 images, whether their number is odd: 0 has an answer that cannot be given, 3 no German, 4 is no image."""
    members = []
    for i in range(COUNT):
        asked = {one: f"odd {one}?" for one in LANGUAGES if (i, one) != (3, "de")}
        meta = {"label": "maybe" if i == 0 else "yes" if i % 2 else "no", "captions": asked}
        data = b"no image" if i == 4 else one_colour((10 * i,) * 3)
        members += [(f"{i:04d}.json", json.dumps(meta).encode()), (f"{i:04d}.png", data)]
    write_tar(folder / "held_out.tar", members)
    (folder / "labels.txt").write_text("no\nyes\n", encoding="utf-8")
    tokenizer = train_unigram(["odd de?", "odd en?", "odd fr?"] * 9, 1100, LANGUAGES)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")


def evaluator_of(folder: Path, languages: tuple[str, ...] = (), held_out: bool = True) -> Answers:
    path, tokenizer = str(folder / "held_out.tar"), str(folder / "tokenizer.json")
    own = {"tokenizer": tokenizer, "labels": str(folder / "labels.txt"), "cache": str(folder / "cache")}
    config = questions.Config(shards=path, held_out=path, **own)
    found = {"": questions.open_held_out(config, Shape(16, 12))} if held_out else {}
    context = eval_context(folder, tokenizer=Tokenizer.load(tokenizer), open_held_out=lambda: found)
    return Answers(AnswersConfig(languages=languages), context)


def work(folder: Path) -> dict:
    evaluator = evaluator_of(folder)
    model = Brightness(evaluator.context.tokenizer.language_tokens["fr"])
    evaluator.check(model)
    result = evaluator.run(subject_of(model))
    german = evaluator_of(folder, ("de",)).run(subject_of(model))
    return {"metrics": result.metrics, "records": result.records, "german": german.metrics}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    write_questions(folder)
    return folder


@pytest.mark.parametrize("world", [1, 3])
def test_accuracies_by_language(folder, world):
    found = found_by_ranks(world, work, folder)
    # 19 can be read, of which one cannot be answered; 10 are odd, of which one is not asked in German.
    assert found["metrics"] == pytest.approx(
        {
            "accuracy/answers, de, zero-shot": 17 / 18,
            "accuracy/answers, en, trained": 18 / 19,
            "accuracy/answers, fr, zero-shot": 0,
            "accuracy/answers, commonest answer": 10 / 19,
            "accuracy/answers, mean of zero-shot": (17 / 18) / 2,
        }
    )
    english = next(one for one in found["records"] if one["feature"] == "en")
    assert (english["setting"], english["test_images"]) == ("trained", 19)
    low, high = english["test_interval"]
    assert low < 18 / 19 < high < 1
    german = {"accuracy/answers, de, zero-shot": 17 / 18, "accuracy/answers, commonest answer": 9 / 18}
    assert {name: found["german"][name] for name in german} == pytest.approx(german)


def test_what_cannot_be_evaluated_is_named(folder):
    model = Brightness(0)
    with pytest.raises(RunError, match="the tokenizer has no token for languages ja"):
        evaluator_of(folder, ("en", "ja")).check(model)
    with pytest.raises(RunError, match="needs the held-out questions of one stream"):
        evaluator_of(folder, held_out=False).check(model)
    with pytest.raises(RunError, match="needs an objective that answers questions about images"):
        evaluator_of(folder).check(nn.Identity())
