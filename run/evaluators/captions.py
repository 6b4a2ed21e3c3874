"""Scores written captions against the true ones.

BLEU is sacrebleu's, in lower case, by its tokenizer of the language. CIDEr and METEOR are those of the package
pycocoevalcap, where it is installed; METEOR starts Java, and is of English. COCO's own evaluation also tokenizes with a
Java program; here sacrebleu's rules do, and punctuation is left out, so metrics differ a little from COCO's.
"""

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mug.data.captions import TEXT_LANGUAGE
from mug.model.objectives.objective import Captions, CaptionsInLanguages
from mug.run.cluster import hardware
from mug.run.common.command_line import check_min
from mug.run.common.errors import RunError
from mug.run.common.packages import load_package
from mug.run.evaluators.bleu import DEFAULT, bleu, split, tokenizer_of
from mug.run.evaluators.evaluator import EvalContext, Evaluator, Result, Subject
from mug.run.evaluators.held_out_pairs import Pair, PairsConfig, check_tokens, images_of, name_of_pairs, open_pairs
from mug.run.evaluators.sharing import gather_numbered

ORDERS = range(1, 5)
OPTIONAL = ("CIDEr", "METEOR")
PACKAGE, EXTRA = "pycocoevalcap", "eval"


@dataclass(frozen=True)
class CaptionsConfig(PairsConfig):
    """Captions of image-text pairs, written by beam search; all captions of a pair in the run's languages are its true
    ones.

    Args:
        beams: 1 is greedy.
        language: language to write in, and of the true captions; without it, the first of the run's where the objective
            writes in several.
    """

    beams: int = 4
    language: str | None = None

    def check(self) -> None:
        super().check()
        check_min(self, {"beams": 1})


class WrittenCaptions(Evaluator):
    """`captions/BLEU-1` to `captions/BLEU-4`, `captions/CIDEr`, `captions/METEOR`, `captions/distinct`: see `score`.

    Captions are written from the full image. A pair without a true one is passed over. The ranks share the writing;
    rank 0 scores.
    """

    Config = CaptionsConfig
    needs = Captions

    def __init__(self, config: CaptionsConfig, context: EvalContext):
        super().__init__(config, context)
        load_package("sacrebleu", EXTRA)
        if config.language:
            check_tokens([config.language], context, "captions.language")
        self.pairs = open_pairs(config, context, config.language)
        self.warned: set[str] = set()

    def check(self, objective: Any) -> None:
        super().check(objective)
        objective.check_captions()

    def run(self, subject: Subject) -> Result:
        objective: Any = subject.whole
        rows: list[tuple[int, dict[str, Any]]] = []
        language = self.config.language or (self.pairs.languages[0] if chooses_language(objective) else None)
        for pairs in self.pairs.captioned_share(objective.config.image_size, self.context.micro_batch):
            self.context.progress(f"captions, pair {pairs[0].number:,} of {len(self.pairs):,}")
            if language:
                having = (pair for pair in pairs if language in pair.texts)
                pairs = [pair._replace(texts={language: pair.texts[language]}) for pair in having]
            rows += self._write(objective, pairs, language) if pairs else []
        lines = gather_numbered(rows)
        self.pairs.report()
        if not lines:
            raise RunError(
                f"none of the pairs of {name_of_pairs(self.config)} has a caption in"
                f" {language or ','.join(self.pairs.languages)};"
                " choose other `shards`"
            )
        written, true = [row["written"] for row in lines], [row["true"] for row in lines]
        scores = hardware.on_rank_zero(lambda: score(written, true, self._warn_once, language))
        about = {
            "method": f"captions, {self.config.beams} beam{'s' * (self.config.beams > 1)}",
            "encoder": self.encoder_name(subject),
        }
        about |= {"data": name_of_pairs(self.config)} | ({"setting": language} if language else {})
        about |= {"images": len(lines)}
        return Result({f"captions/{name}": value for name, value in scores.items()}, [about | scores], lines)

    def _warn_once(self, line: str) -> None:
        if line not in self.warned:
            self.context.console.warn(line)
        self.warned.add(line)

    @torch.inference_mode()
    def _write(self, objective: Any, pairs: list[Pair], language: str | None) -> list[tuple[int, dict[str, Any]]]:
        """Returns the number of each pair, and its line of captions.jsonl."""
        of = {"language": objective.languages().index(language)} if chooses_language(objective) else {}
        tokens_BT = objective.caption(images_of(pairs), self.config.beams, **of)
        written = self.context.decode(tokens_BT)
        return [
            (pair.number, {"key": pair.key, "written": text, "true": pair.captions})
            for pair, text in zip(pairs, written, strict=True)
        ]


def chooses_language(objective: object) -> bool:
    """Whether the objective writes in a language of choice."""
    return isinstance(objective, CaptionsInLanguages) and bool(objective.languages())


def score(
    written: Sequence[str],
    true: Sequence[Sequence[str]],
    warn: Callable[[str], None],
    language: str | None = None,
) -> dict[str, float]:
    """Returns BLEU-1 to BLEU-4 (0..100), CIDEr and METEOR (0..1, CIDEr up to 10) of N captions against the true ones.

    `distinct` is the share of different captions among the written: a model that writes one for every image has 1 / N.
    BLEU-4 of captions assigned to the wrong image shows how much of the score is only the language.

    Args:
        warn: called once for each metric that is left out, with the reason.
        language: of the captions, which decides how they are cut into words; None for words between spaces.
    """
    tokenizer = tokenizer_of(language) if language else DEFAULT
    metrics = {f"BLEU-{order}": bleu(written, true, order, tokenizer) for order in ORDERS}
    metrics["BLEU-4 of another image's"] = bleu([*written[1:], *written[:1]], true, 4, tokenizer)
    metrics["distinct"] = len(set(written)) / len(written)
    lacking = missing() | ({} if language in (None, TEXT_LANGUAGE) else {"METEOR": f"it is of English, not {language}"})
    for name in OPTIONAL:
        if name in lacking:
            warn(f"{name} is left out: {lacking[name]}")
        else:
            metrics[name] = coco(name, written, true, tokenizer)
    return metrics


def missing() -> dict[str, str]:
    """Returns the optional metrics that are unavailable here, and why."""
    if importlib.util.find_spec(PACKAGE) is None:
        return dict.fromkeys(OPTIONAL, f"package {PACKAGE} is not installed (pip install -e '.[eval]')")
    return {} if shutil.which("java") else {"METEOR": "it needs Java"}


def coco(name: str, written: Sequence[str], true: Sequence[Sequence[str]], tokenizer: str = DEFAULT) -> float:
    """Returns CIDEr or METEOR of the full set."""
    if name == "CIDEr":
        from pycocoevalcap.cider.cider import Cider as Scorer
    else:
        from pycocoevalcap.meteor.meteor import Meteor as Scorer
    ours = {i: [words(caption, tokenizer)] for i, caption in enumerate(written)}
    theirs = {i: [words(caption, tokenizer) for caption in captions] for i, captions in enumerate(true)}
    return float(Scorer().compute_score(theirs, ours)[0])


def words(caption: str, tokenizer: str = DEFAULT) -> str:
    """Returns the caption in lower case, tokenized, without punctuation."""
    return " ".join(part for part in split(caption, tokenizer) if any(character.isalnum() for character in part))
