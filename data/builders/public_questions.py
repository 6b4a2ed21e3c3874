"""Public questions about images in many languages, as they are published: XVNLI with SNLI-VE, and xGQA with GQA.

Training is in English; held out are the tests, a row for each question, in all languages that have it. The images
are in the folder `images`, under the names that the questions give, with or without `.jpg`.

    XVNLI   annotations/en/train.jsonl (SNLI-VE's), annotations/LANGUAGE/test.jsonl
    xGQA    train_balanced_questions.json (GQA's), testdev_balanced_questions_LANGUAGE.json
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mug.data.builders.writers import Sample
from mug.data.captions import clean
from mug.data.errors import DataError
from mug.data.left_out import LeftOut

ENGLISH = "en"


class Asked(NamedTuple):
    """A question, or a statement, in one language."""

    image: object
    text: object
    label: object


Reader = Callable[[Path], Iterator[tuple[str, Asked]]]  # file → its questions, each after its id
Files = dict[str, dict[str, Path]]  # split → language → file


def xvnli_samples(source: Path, left_out: LeftOut, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields those statements whose key, SPLIT/ID, is wanted; their labels are entailment, neutral, contradiction.

    Raises:
        DataError: files are missing or damaged.
    """
    tests = {path.parent.name: path for path in sorted(source.glob("annotations/*/test.jsonl"))}
    files = {"train": {ENGLISH: source / "annotations" / ENGLISH / "train.jsonl"}, "held_out": tests}
    rights = {
        "license": "those of SNLI-VE, XVNLI and Flickr30k",
        "attribution": "SNLI-VE (arXiv 1901.06706), XVNLI of IGLUE (arXiv 2201.11732), Flickr30k",
    }
    return _samples(source, files, _statements, rights, left_out, wanted)


def xgqa_samples(source: Path, left_out: LeftOut, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields those questions whose key, SPLIT/ID, is wanted.

    Raises:
        DataError: files are missing or damaged.
    """
    name = "testdev_balanced_questions_"
    tests = {path.stem.removeprefix(name): path for path in sorted(source.glob(f"{name}*.json"))}
    files = {"train": {ENGLISH: source / "train_balanced_questions.json"}, "held_out": tests}
    rights = {
        "license": "those of GQA and xGQA",
        "attribution": "GQA (arXiv 1902.09506), xGQA (arXiv 2109.06082)",
    }
    return _samples(source, files, _questions, rights, left_out, wanted)


def _statements(path: Path) -> Iterator[tuple[str, Asked]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            one = json.loads(line)
            yield one["pairID"], Asked(one["Flikr30kID"], one["sentence2"], one["gold_label"])


def _questions(path: Path) -> Iterator[tuple[str, Asked]]:
    with open(path, encoding="utf-8") as file:
        for name, one in json.load(file).items():
            yield name, Asked(one["imageId"], one["question"], one["answer"])


def _samples(
    source: Path, files: Files, read: Reader, rights: dict[str, str], left_out: LeftOut, wanted: Callable[[str], bool]
) -> Iterator[Sample]:
    for split, by_language in files.items():
        if not wanted(f"{split}/"):
            continue
        if not by_language:
            raise DataError(f"'{source}' has no test files: docs/transfer.md lists what it must hold")
        for name, (asked, captions) in _joined(by_language, read, left_out).items():
            image = _image(source, str(asked.image))
            if image is None:
                left_out.add("questions whose image is missing", f"'{asked.image}' of '{name}'")
                continue
            key = f"{split}/{name.replace('.', '_').replace('/', '_')}"
            meta = {"key": key, "label": asked.label, "captions": captions, "image": image.name, **rights}
            yield Sample(key, image.read_bytes(), image.suffix[1:].lower(), captions.get(ENGLISH, ""), meta)


def _joined(by_language: dict[str, Path], read: Reader, left_out: LeftOut) -> dict[str, tuple[Asked, dict[str, str]]]:
    """Returns id → question of the first language that has it, English before others, and its texts by language."""
    found: dict[str, tuple[Asked, dict[str, str]]] = {}
    for language in sorted(by_language, key=lambda one: (one != ENGLISH, one)):
        path = by_language[language]
        try:
            for name, asked in read(path):
                text = clean(asked.text) if isinstance(asked.text, str) else ""
                first, captions = found.get(name, (asked, {}))
                if not text or not isinstance(asked.label, str) or asked.label in ("", "-"):
                    left_out.add("questions without a text or an answer", f"'{name}' in '{path}'")
                elif (asked.image, asked.label) != (first.image, first.label):
                    left_out.add("translations with another image or answer", f"'{name}' in '{path}'")
                else:
                    found[name] = first, captions | {language: text}
        except OSError as error:
            raise DataError(
                f"'{path}' cannot be read ({error.strerror}): docs/transfer.md lists what is needed"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"'{path}' is damaged ({error!r}): fetch it again") from error
    return found


def _image(source: Path, name: str) -> Path | None:
    """Returns the file of an image; None where it is missing, or its name leads elsewhere."""
    if Path(name).name != name:
        return None
    paths = (source / "images" / one for one in (name, f"{name}.jpg"))
    return next((path for path in paths if path.is_file() and path.suffix), None)
