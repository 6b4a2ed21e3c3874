"""Answers to questions: losses and gradients against formulae in float64, and what a fine-tuning begins with."""

import dataclasses

import pytest
import torch
import unix2 as oracle
from noise import noisy
from plain import encode, linear, parameters
from torch import Tensor, nn
from unix2 import SIZES, VOCABULARY, batch_at

from mug.data.kinds.samples import Batch
from mug.model.objectives.answer import Answer, AnswerConfig
from mug.model.objectives.objective import AnswersQuestions, Context
from mug.model.presets import resolve

POSITIONS = [1, 2, 3, 4, 6, 7]
LABELS = [2, 0, -1, 4, 4, 1]
ANSWERS = ("no", "yes", "red", "two", "left")


def make(loss: str) -> Answer:
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name not in ("decoder_layers", "embedding_width")}
    context = Context(seed=3, vocabulary=VOCABULARY, class_names=ANSWERS)
    return noisy(Answer(resolve(AnswerConfig(**sizes, loss=loss)), context))


def questions() -> Batch:
    return Batch("questions", {**batch_at("pairs", POSITIONS), "label": torch.tensor(LABELS)})


def logits_of(model: Answer, p: dict[str, Tensor], image: Tensor, tokens: Tensor) -> Tensor:
    """[K], of one question without padding."""
    words = p | {"head.weight": p["text_encoder.words.embed.weight"]}
    state = oracle.fuse(p, encode(p, model, image), oracle.read(words, tokens[tokens != 0]))[0]
    return linear(p, "head.3", oracle.norm(p, "head.2", nn.functional.gelu(linear(p, "head.0", state))))


def loss_of(logits: Tensor, label: int, loss: str) -> Tensor:
    if loss == "cross_entropy":
        return -logits.log_softmax(0)[label]
    return -sum((logit if k == label else -logit).sigmoid().log() for k, logit in enumerate(logits))


@pytest.mark.parametrize("loss", ["cross_entropy", "binary"])
def test_loss_and_every_gradient_are_the_formulae(loss):
    model, batch = make(loss), questions()
    p = parameters(model)
    logits = [logits_of(model, p, *sample) for sample in zip(batch["image"], batch["tokens"], strict=True)]
    known = [(one, label) for one, label in zip(logits, LABELS, strict=True) if label >= 0]
    expected = sum(loss_of(one, label, loss) for one, label in known) / len(known)
    losses, metrics = model(batch)
    torch.testing.assert_close(losses["answer"].double(), expected, rtol=1e-5, atol=1e-6)
    assert metrics["accuracy/answer"].item() == pytest.approx(sum(one.argmax() == k for one, k in known) / len(known))
    assert losses["answer"].dtype == torch.float32 and model.counts(batch) == {"answer": 5}
    losses["answer"].backward()
    expected.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad.double(), p[name].grad, rtol=1e-4, atol=2e-6, msg=name)


@torch.no_grad()
def test_several_questions_about_an_image_are_answered_as_each_alone():
    model, batch = make("cross_entropy"), questions()
    assert isinstance(model, AnswersQuestions)
    image, tokens = batch["image"][:2], batch["tokens"]
    found = model.answer(image, tokens)
    p = parameters(model)
    expected = [logits_of(model, p, image[s % 2], tokens[s]) for s in range(6)]
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_batch_in_parts_has_the_loss_of_the_whole_and_none_without_answers():
    model, batch = make("cross_entropy"), questions()
    whole = model(batch)[0]["answer"]
    parts = [Batch("questions", {name: x[rows] for name, x in batch.items()}) for rows in ([0, 1], [2, 3, 4, 5])]
    found = sum(model(part)[0]["answer"] * model.counts(part)["answer"] for part in parts) / 5
    torch.testing.assert_close(found, whole)
    none = Batch("questions", {name: x[2:3] for name, x in batch.items()})
    assert model.counts(none) == {"answer": 0} and model(none)[0]["answer"] == 0


def test_flops_of_a_base_model_are_those_of_the_parts():
    """Of 20 tokens and 197 states of an image."""
    vocabulary = dataclasses.replace(VOCABULARY, size=1000)
    with torch.device("meta"):
        model = Answer(resolve(AnswerConfig("base")), Context(vocabulary=vocabulary, class_names=("a",) * 3))
    batch = Batch("questions", {"tokens": torch.tensor([[1, *range(10, 28), 2]] * 2)})
    D, T, F = 1024, 20, 1 + 197 + 20
    layers = 12 * sum(12 * D**2 * n + 2 * n**2 * D for n in (T, F))
    vit = 196 * 768 * 768 + 12 * (12 * 768**2 * 197 + 2 * 197**2 * 768)
    head = D * 2 * D + 2 * D * 3
    assert model.flops(batch) / 2 == pytest.approx(6 * (layers + vit + 197 * 768 * D + head), rel=1e-6)
