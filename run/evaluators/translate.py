"""Scores translations by BLEU, and what an image is worth to them: with it, without one, and with another pair's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mug.model.objectives.objective import Translates
from mug.run.cluster import hardware
from mug.run.common.command_line import check_min
from mug.run.common.errors import RunError
from mug.run.common.packages import load_package
from mug.run.evaluators.bleu import bleu, bootstrapped, signature, tokenizer_of
from mug.run.evaluators.evaluator import EvalContext, Evaluator, Result, Subject
from mug.run.evaluators.held_out_pairs import (
    Pair,
    PairsConfig,
    check_tokens,
    images_of,
    name_of_pairs,
    open_texts,
    tokens_of,
)
from mug.run.evaluators.intervals import interval
from mug.run.evaluators.sharing import gather_numbered

KINDS = ("image_bitext", "bitext")
OWN, WITHOUT, OTHER = "BLEU", "BLEU without image", "BLEU with another image"
EXTRA = "eval"


@dataclass(frozen=True)
class TranslateConfig(PairsConfig):
    """Translations, written by beam search; without `shards`, of the run's held-out images with texts in two languages,
    else of its held-out bitext.

    Args:
        source: language to translate from.
        target: language to translate into; all texts of a row in it are true ones.
        beams: 1 is greedy.
    """

    limit: int = 1000
    source: str = "en"
    target: str = "de"
    beams: int = 4

    def check(self) -> None:
        super().check()
        check_min(self, {"beams": 1})
        if self.source == self.target:
            raise RunError(f"source and target are both {self.source}: give two languages")


class Translate(Evaluator):
    """`translation/BLEU` (sacrebleu's BLEU-4, 0..100) and `translation/BLEU, lower case`; of rows with images also
    `translation/BLEU without image` and `translation/BLEU with another image`, and in the record the differences to
    these with 95% intervals by paired bootstrap.

    Another image is that of the row half-way round the set, or the next one that differs. Rows that lack a language are
    passed over. The ranks share the writing; rank 0 scores.
    """

    Config = TranslateConfig
    needs = Translates

    def __init__(self, config: TranslateConfig, context: EvalContext):
        super().__init__(config, context)
        load_package("sacrebleu", EXTRA)
        languages = (config.source, config.target)
        check_tokens(languages, context, "translate.source or target")
        self.pairs = open_texts(config, context, KINDS, languages)

    def check(self, objective: Any) -> None:
        super().check(objective)
        objective.check_translations()
        if not objective.languages():
            raise RunError("evaluation translate needs a tokenizer with language tokens")

    def run(self, subject: Subject) -> Result:
        rows = gather_numbered(self._write_share(subject.whole))
        self.pairs.report()
        source, target = self.config.source, self.config.target
        if not rows:
            raise RunError(f"none of {name_of_pairs(self.config)} has texts in {source} and {target}; choose others")
        scores = hardware.on_rank_zero(lambda: score(rows, tokenizer_of(target)))
        beams = f"{self.config.beams} beam{'s' * (self.config.beams > 1)}"
        about = {"method": f"translation, {beams}", "encoder": self.encoder_name(subject)}
        about |= {"data": name_of_pairs(self.config), "setting": f"{source} to {target}", "texts": len(rows)}
        metrics = {f"translation/{name}": value for name, value in scores.items() if isinstance(value, float)}
        return Result(metrics, [about | scores], translations=rows)

    @torch.inference_mode()
    def _write_share(self, objective: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the number of each row of this rank, and its line of translations.jsonl."""
        size, batch = objective.config.image_size if self.pairs.has_images else None, self.context.micro_batch
        wanted = {self.config.source, self.config.target}
        for pairs in self.pairs.share(size, batch, lambda pair: wanted <= pair.texts.keys()):
            self.context.progress(f"translation, row {pairs[0].number:,} of {len(self.pairs):,}")
            images = {OWN: images_of(pairs) if size else None}
            if size:
                others = [self._other(pair, size) for pair in pairs]
                images |= {WITHOUT: None, OTHER: images_of(others)}
            written = {name: self._translated(objective, pairs, image) for name, image in images.items()}
            for i, pair in enumerate(pairs):
                texts = {name: some[i] for name, some in written.items()}
                source, true = pair.texts[self.config.source][0], pair.texts[self.config.target]
                yield pair.number, {"key": pair.key, "source": source, "written": texts, "true": true}

    def _translated(self, objective: Any, pairs: list[Pair], image_BCHW: Tensor | None) -> list[str]:
        source, target, tokenizer = self.config.source, self.config.target, self.context.tokenizer
        assert tokenizer is not None  # of the texts that it learned
        texts = [pair.texts[source][0] for pair in pairs]
        source_BT = tokens_of(texts, tokenizer, objective.config.text_length, source)
        number = objective.languages().index(target)
        written_BT = objective.translate(source_BT, number, self.config.beams, image_BCHW)
        return self.context.decode(written_BT)

    def _other(self, pair: Pair, size: int) -> Pair:
        """Returns the pair half-way round the set, or the first after it, whose image differs.

        Raises:
            RunError: all images are the same.
        """
        count = len(self.pairs)
        numbers = ((pair.number + count // 2 + step) % count for step in range(count))
        for other in self.pairs.read(numbers, size):
            if not np.array_equal(other.image, pair.image):
                return other
        raise RunError(
            f"all images of {name_of_pairs(self.config)} are the same: there is no other one to translate with"
        )


def score(rows: list[dict[str, Any]], tokenizer: str) -> dict[str, Any]:
    """Returns BLEU of each way that the rows were `written`, in their own case and in lower case, its signature, and
    the differences of the first way to the others with their intervals.

    tokenizer: sacrebleu's, of the target language.
    """
    true = [row["true"] for row in rows]
    systems = {name: [row["written"][name] for row in rows] for name in rows[0]["written"]}
    scores: dict[str, Any] = {}
    for name, written in systems.items():
        scores[name] = bleu(written, true, 4, tokenizer, lowercase=False)
        scores[f"{name}, lower case"] = bleu(written, true, 4, tokenizer)
    scores["signature"] = signature(true, tokenizer)
    resampled = dict(zip(systems, bootstrapped([*systems.values()], true, tokenizer), strict=True))
    scores["BLEU interval"] = interval(resampled[OWN])
    for name in [*systems][1:]:
        scores[f"gain over {name}"] = scores[OWN] - scores[name]
        scores[f"gain over {name} interval"] = interval(resampled[OWN] - resampled[name])
    return scores
