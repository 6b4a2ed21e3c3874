"""Questions about images, each with one answer of a list; or statements, whose answer is whether they are true."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from mug.data.captions import by_language, parse_json
from mug.data.config import DataConfig
from mug.data.errors import BadSample, DataError
from mug.data.kinds.pairs import ImageSamples
from mug.data.kinds.samples import Shape
from mug.data.reader import Parts
from mug.data.row_samples import Place, load_tokenizer, open_rows

NO_LABEL = -1


@dataclass
class QuestionsConfig(DataConfig):
    """Where questions about images come from; their texts are the captions.

    Args:
        labels: File of the answers, one a line, or a list of them in JSON: labels.txt next to the shards, if
            run/build_shards.py wrote them.
    """

    labels: str | None = None


Config = QuestionsConfig


class Question(NamedTuple):
    """A row to evaluate on.

    image: uint8 [3, S, S]. tokens: language → int64 [T]. label: the number of its answer, -1 if that is not among them.
    """

    image: np.ndarray
    tokens: dict[str, np.ndarray]
    label: int


@dataclass(frozen=True, eq=False)
class Questions(ImageSamples):
    """The rows of an index whose json has the answer as `label`, and questions as `captions` by language.

    A batch has `image` uint8 [B, 3, S, S]; `tokens` int64 [B, T], the question in the language whose turn it is, BOS
    first, EOS and, if the tokenizer has languages, that of the question last, PAD after; `label` int64 [B], the number
    of its answer; `position` int64 [B]. A held-out answer that is none of the labels is -1; in training its row is
    replaced.

    labels: the K answers.
    """

    labels: tuple[str, ...]

    kind: ClassVar[str] = "questions"

    @classmethod
    def further(cls, config: Any, shape: Shape) -> tuple:
        shape.check_one_view("questions")
        return *super().further(config, shape), read_labels(config.labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Returns the answers, by their number."""
        return self.labels

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels)}

    def sample(self, place: Place, parts: Parts) -> Mapping[str, np.ndarray]:
        """Returns the image, the question and the number of its answer."""
        label = self._label(parts)
        if label == NO_LABEL and self.order is not None:
            raise BadSample("an answer that is not in data.labels")
        language, text = self.text_in_turn(place, parts)
        return {**self.pixels(place, parts[0]), "tokens": self.encode(text, language), "label": np.array(label)}

    def question(self, number: int, languages: tuple[str, ...]) -> Question:
        """Returns a row by its number, in those of the languages that it has.

        Raises:
            BadSample: the row cannot be used.
            DataError: its shard cannot be read.
        """
        ((_, shard, row),) = zip(*(array.tolist() for array in self.view.locate(np.array([number]))), strict=True)
        parts = self.reader.read(shard, row)
        texts = by_language(*parts[1:], languages)
        tokens = {one: self.encode(texts[one][0], one) for one in languages if one in texts}
        return Question(self.pixels(Place(number, 0, shard, row), parts[0])["image"], tokens, self._label(parts))

    def _label(self, parts: Parts) -> int:
        """Raises BadSample where the json holds no answer."""
        label = parse_json(parts[2], needed=False).get("label")
        if not isinstance(label, str):
            raise BadSample("its json has no text under 'label'")
        return self._numbers.get(label, NO_LABEL)


def read_labels(path: str | None) -> tuple[str, ...]:
    """Returns the answers that a file lists.

    Raises:
        DataError: it is missing or damaged, or holds none, or one twice.
    """
    if path is None:
        raise DataError("data.labels is missing: give the file of the answers, one a line")
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        labels = json.loads(text) if path.endswith(".json") else text.splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"data.labels {path} cannot be read ({error}): give a file of answers, one a line") from error
    if not isinstance(labels, list) or not labels or not all(isinstance(one, str) and one for one in labels):
        raise DataError(f"data.labels {path} is not a list of answers: give one a line, or a list of texts in JSON")
    if len(set(labels)) < len(labels):
        twice = next(one for one in labels if labels.count(one) > 1)
        raise DataError(f"data.labels {path} has '{twice}' twice: remove one")
    return tuple(labels)


def open_train(config: QuestionsConfig, seed: int, shape: Shape) -> Questions:
    """Returns the questions to train on.

    Raises:
        DataError: shards, tokenizer or labels are missing or damaged.
    """
    if config.shards is None:
        raise DataError("data.shards is missing: give questions about images (docs/transfer.md)")
    return open_rows(Questions, config.shards, config, shape, load_tokenizer(config.tokenizer, config), seed)


def open_held_out(config: QuestionsConfig, shape: Shape) -> Questions | None:
    """Returns the held-out questions, in the order of the shards; None where there are none.

    Raises:
        DataError: see `open_train`.
    """
    if config.held_out is None:
        return None
    return open_rows(Questions, config.held_out, config, shape, load_tokenizer(config.tokenizer, config))
