"""Answers to held-out questions about images: accuracy by language, as XVNLI and xGQA are evaluated.

Dimension letters: B images, V languages, T tokens, K answers.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from mug.data.errors import BadSample
from mug.data.kinds.questions import Question, Questions
from mug.data.order import spread
from mug.model.objectives.objective import AnswersQuestions, Objective
from mug.run.cluster import hardware
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import EvalConfig, Evaluator, Result, Subject
from mug.run.evaluators.results import Accuracies
from mug.run.evaluators.sharing import share

log = logging.getLogger("mug")


@dataclass(frozen=True)
class AnswersConfig(EvalConfig):
    """Held-out questions, `trainer.eval_samples` of them, spread over the set, in all languages that they have.

    Args:
        languages: to ask in; without any, all that the tokenizer has a token for.
    """

    languages: tuple[str, ...] = ()


class Answered(NamedTuple):
    """number: of the question. label: its answer, -1 of none that can be given. given: language → answer."""

    number: int
    label: int
    given: dict[str, int]


class Answers(Evaluator):
    """`accuracy/answers, LANGUAGE, trained` of languages that the run learned from, `…, zero-shot` of the others, their
    mean `accuracy/answers, mean of zero-shot`, and `accuracy/answers, commonest answer`: that of giving the commonest
    of the held-out answers each time. An answer that is none of data.labels is never right. The ranks share the images.
    """

    Config = AnswersConfig
    needs = AnswersQuestions

    def check(self, objective: Objective) -> None:
        super().check(objective)
        found = self.context.held_out.values()
        if len(found) != 1 or not isinstance(next(iter(found)), Questions):
            raise RunError("evaluation answers needs the held-out questions of one stream: give data.held_out")
        tokenizer: Any = self.context.tokenizer
        if unknown := [one for one in self.config.languages if tokenizer.languages and one not in tokenizer.languages]:
            raise RunError(f"evaluation answers: the tokenizer has no token for languages {', '.join(unknown)}")

    def run(self, subject: Subject) -> Result:
        (samples,) = self.context.held_out.values()
        assert isinstance(samples, Questions)
        tokenizer: Any = samples.tokenizer
        languages = self.config.languages or tokenizer.languages or samples.languages
        answered = sorted(hardware.gather(self._answer_share(subject.whole, samples, languages)))
        if not answered:
            raise RunError(f"no held-out question is in any of the languages {', '.join(languages)}")
        about = {"method": "answers", "encoder": self.encoder_name(subject), "data": "held-out questions"}
        return result_of(answered, samples.languages, about)

    @torch.inference_mode()
    def _answer_share(self, objective: Any, samples: Questions, languages: Sequence[str]) -> list[Answered]:
        """Returns this rank's questions, answered; a collective call."""
        numbers, left_out, answered = spread(len(samples), self.context.max_samples), [], []
        readable = _readable(samples, [numbers[i] for i in share(len(numbers))], tuple(languages), left_out)
        while batch := list(itertools.islice(readable, max(1, self.context.micro_batch // len(languages)))):
            self.context.progress(f"answers, question {batch[0][0]:,} of {len(samples):,}")
            answered += answer(objective, batch, languages)
        if left_out := hardware.gather(left_out):
            log.warning(
                "%d of %d held-out questions cannot be used and were left out; the first: %s",
                *(len(left_out), len(numbers), left_out[0]),
            )
        return answered


def _readable(
    samples: Questions, numbers: Sequence[int], languages: tuple[str, ...], left_out: list[str]
) -> Iterator[tuple[int, Question]]:
    """Yields the questions that can be read, after their numbers; adds the others to `left_out`."""
    for number in numbers:
        try:
            question = samples.question(number, languages)
        except BadSample as error:
            left_out.append(f"number {number}: {error}")
            continue
        if question.tokens:
            yield number, question
        else:
            left_out.append(f"number {number}: no text in any of the languages")


def answer(objective: Any, batch: Sequence[tuple[int, Question]], languages: Sequence[str]) -> list[Answered]:
    """Returns the questions of a batch, answered in those of the languages that each has."""
    questions = [question for _, question in batch]
    nothing_T = np.zeros_like(next(iter(questions[0].tokens.values())))  # its answer is not read
    tokens_ST = np.stack([question.tokens.get(one, nothing_T) for one in languages for question in questions])
    image_BCHW = np.stack([question.image for question in questions])
    device = hardware.device()
    logits_SK = objective.answer(torch.from_numpy(image_BCHW).to(device), torch.from_numpy(tokens_ST).to(device))
    given_VB = logits_SK.argmax(1).unflatten(0, (len(languages), -1)).tolist()
    return [
        Answered(
            number,
            question.label,
            {one: given_VB[v][b] for v, one in enumerate(languages) if one in question.tokens},
        )
        for b, (number, question) in enumerate(batch)
    ]


def result_of(answered: Sequence[Answered], trained: Sequence[str], about: dict[str, Any]) -> Result:
    """Returns the accuracies of `Answers`, each with its interval; `about` begins each record."""
    accuracies, zero_shot = Accuracies(), []
    for language in dict.fromkeys(one for question in answered for one in question.given):
        asked = [question for question in answered if language in question.given]
        right_M = torch.tensor([question.given[language] == question.label for question in asked])
        accuracies.add(language, "trained" if language in trained else "zero-shot", right_M)
        if language not in trained:
            zero_shot.append(right_M.double().mean().item())
    labels_M = torch.tensor([question.label for question in answered])
    ((commonest, _),) = Counter(label for label in labels_M.tolist() if label >= 0).most_common(1) or [(0, 0)]
    accuracies.add("commonest answer", "", labels_M == commonest)
    result = accuracies.result("answers", about)
    if not zero_shot:
        return result
    mean = {"accuracy/answers, mean of zero-shot": sum(zero_shot) / len(zero_shot)}
    setting = {"setting": f"mean of {len(zero_shot)} languages, zero-shot"}
    return Result(result.metrics | mean, [*result.records, about | setting | mean])
