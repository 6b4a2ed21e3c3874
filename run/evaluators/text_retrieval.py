"""Translations found by their embeddings, as Tatoeba is evaluated (arXiv 1812.10464, section 4.3): each text's nearest
neighbour by cosine, among the texts of the other language.

Dimension letters: N rows, U distinct texts, Q queries, C candidates, E size of an embedding.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mug.data.captions import TEXT_LANGUAGE, languages_in
from mug.data.config import TextConfig
from mug.data.order import spread
from mug.model.objectives.objective import EmbedsSentences
from mug.run.cluster import hardware
from mug.run.common.command_line import check_min
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import EvalContext, Evaluator, Result, Subject
from mug.run.evaluators.features import fast_products
from mug.run.evaluators.held_out_pairs import PairsConfig, check_tokens, name_of_pairs, open_texts, tokens_of
from mug.run.evaluators.intervals import Accuracy, bootstrap, interval
from mug.run.evaluators.retrieval import places
from mug.run.evaluators.sharing import gather_rows, share

KINDS = ("bitext", "image_bitext")
SHOWN = 8  # languages, in a message

log = logging.getLogger("mug")


@dataclass(frozen=True)
class TextRetrievalConfig(PairsConfig):
    """Translations to find, between English and each other language; without `shards`, the run's held-out bitext.

    Args:
        languages: the other languages, 'de,fr'; without it, all that the tokenizer has tokens of and the rows have.
        candidates: max pairs of a language, spread evenly over its rows; Tatoeba has 1,000.
    """

    limit: int = 200_000
    languages: str | None = None
    candidates: int = 1000

    def check(self) -> None:
        super().check()
        check_min(self, {"candidates": 2})
        TextConfig(language=self.languages or TEXT_LANGUAGE)  # raises where one is empty


class Translations(NamedTuple):
    """The pairs of a language: the number of each row, its text, and the English one."""

    rows: list[int]
    texts: list[str]
    english: list[str]


class TextRetrieval(Evaluator):
    """`text retrieval/LANGUAGE to en` and `en to LANGUAGE`, the shares of texts whose nearest neighbour is their
    translation; `mean to en` and `mean from en` over the languages; `mean chance`.

    Ties count against a text, but not a second candidate with the words of its translation. The ranks share the work.
    Intervals are Wilson's; of the means, over the draw of the rows.
    """

    Config = TextRetrievalConfig
    needs = EmbedsSentences

    def __init__(self, config: TextRetrievalConfig, context: EvalContext):
        super().__init__(config, context)
        named = TextConfig(language=config.languages).languages() if config.languages else ()
        known = named or (context.tokenizer.languages if context.tokenizer else ())
        if not known:
            raise RunError("the tokenizer has no language tokens: name languages by text_retrieval.languages")
        check_tokens([*known, TEXT_LANGUAGE], context, "text_retrieval.languages")
        self.pairs = open_texts(config, context, KINDS, [*dict.fromkeys([*known, TEXT_LANGUAGE])])

    def run(self, subject: Subject) -> Result:
        pairs = self._pairs()
        embedded = self._embed(subject.whole, pairs)
        hits = {language: found(some, language, embedded) for language, some in pairs.items()}
        about = {"method": "text retrieval", "encoder": self.encoder_name(subject), "data": name_of_pairs(self.config)}
        records, metrics = [], {}
        for language, hits_N3 in hits.items():
            to, back, chance = hits_N3.mean(0).tolist()
            metrics |= {f"text retrieval/{language} to en": to, f"text retrieval/en to {language}": back}
            record = about | {
                "setting": language,
                "pairs": len(hits_N3),
                "to en": to,
                "from en": back,
                "chance": chance,
            }
            for name, share_found in (("to en", to), ("from en", back)):
                record[f"{name} interval"] = Accuracy((share_found,), len(hits_N3)).test_interval()
            records.append(record)
        names = ("to en", "from en", "chance")
        means = dict(zip(names, np.mean([hits_N3.mean(0) for hits_N3 in hits.values()], axis=0).tolist(), strict=True))
        intervals_R2 = mean_intervals(pairs, hits)
        over = {f"{name} interval": interval(values_R) for name, values_R in zip(names, intervals_R2.T, strict=False)}
        records.append(about | {"setting": "mean over languages", "languages": len(hits)} | means | over)
        return Result(metrics | {f"text retrieval/mean {name}": value for name, value in means.items()}, records)

    def _pairs(self) -> dict[str, Translations]:
        """Returns language → pairs with English, at most `candidates` of each.

        Raises:
            RunError: a language that the options name has less than two, or all have.
        """
        mine, others = [], set()
        for pair in self.pairs.read(share(len(self.pairs)), None):
            mine.append((pair.number, {language: texts[0] for language, texts in pair.texts.items()}))
            others |= languages_in(b"", pair.meta) - {*self.pairs.languages}
        rows, unknown = sorted(hardware.gather(mine)), sorted({*hardware.gather(sorted(others))})
        self.pairs.report()
        found = {}
        for language in self.pairs.languages:
            having = [(number, texts) for number, texts in rows if language in texts and TEXT_LANGUAGE in texts]
            if language == TEXT_LANGUAGE or (len(having) < 2 and not self.config.languages):
                continue
            if len(having) < 2:
                raise RunError(
                    f"{name_of_pairs(self.config)} has {len(having)} pairs in {language} and en; leave it out"
                )
            kept = [having[i] for i in spread(len(having), self.config.candidates)]
            found[language] = Translations(
                [number for number, _ in kept],
                [texts[language] for _, texts in kept],
                [texts[TEXT_LANGUAGE] for _, texts in kept],
            )
        if not found:
            raise RunError(f"{name_of_pairs(self.config)} has no pairs of en and a language of the tokenizer")
        if unknown and not self.config.languages:
            shown = ", ".join(unknown[:SHOWN]) + ", …" * (len(unknown) > SHOWN)
            log.warning("text retrieval leaves out %d languages without a token: %s", len(unknown), shown)
        return found

    @torch.inference_mode()
    def _embed(self, objective: Any, pairs: dict[str, Translations]) -> dict[tuple[str, str], Tensor]:
        """Returns (language, text) → its embedding, fp32 [E] on the CPU; a collective call."""
        texts = {(language, text) for language, some in pairs.items() for text in some.texts}
        texts |= {(TEXT_LANGUAGE, text) for some in pairs.values() for text in some.english}
        distinct, parts = sorted(texts), []
        mine = [distinct[i] for i in share(len(distinct))] or distinct[:1]  # sorted: a language's stand together
        length, batch, tokenizer = objective.config.text_length, self.context.micro_batch, self.context.tokenizer
        assert tokenizer is not None  # of the texts that it learned
        for i in range(0, len(mine), batch):
            self.context.progress(f"text retrieval, text {i:,} of {len(mine):,}")
            rows = [tokens_of([text], tokenizer, length, language) for language, text in mine[i : i + batch]]
            with fast_products(hardware.device()):
                parts.append(objective.embed_sentence(torch.cat(rows)).float().cpu())
        return dict(zip(distinct, gather_rows(torch.cat(parts), len(distinct)), strict=True))


def found(pairs: Translations, language: str, embedded: dict[tuple[str, str], Tensor]) -> np.ndarray:
    """Returns float64 [N, 3]: whether a text found its English translation, whether the English text found it, and the
    chance of either. A collective call: each rank compares its share."""
    texts_NE = torch.stack([embedded[language, text] for text in pairs.texts])
    english_NE = torch.stack([embedded[TEXT_LANGUAGE, text] for text in pairs.english])
    to_N, to_chance_N = nearest(texts_NE, english_NE, pairs.english)
    back_N, back_chance_N = nearest(english_NE, texts_NE, pairs.texts)
    return torch.stack([to_N, back_N, (to_chance_N + back_chance_N) / 2], dim=1).numpy()


def nearest(query_NE: Tensor, candidate_NE: Tensor, candidates: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Returns float64 [N], whether the candidate nearest to a query has the words of its own, and the chance of it."""
    number = {text: i for i, text in enumerate(dict.fromkeys(candidates))}
    word_N = torch.tensor([number[text] for text in candidates])
    mine = torch.tensor([*share(len(query_NE))]).long()
    own_nN = word_N[mine][:, None] == word_N
    hit_n = places(query_NE[mine] @ candidate_NE.T, own_nN) == 0
    mine_n2 = torch.stack([hit_n.double(), own_nN.double().mean(1)], dim=1)
    hit_N, chance_N = gather_rows(mine_n2, len(query_NE)).unbind(1)
    return hit_N, chance_N


def mean_intervals(pairs: dict[str, Translations], hits: dict[str, np.ndarray]) -> np.ndarray:
    """Returns float64 [R, 2], the means over the languages on resamples of the rows that these share."""
    rows = {number: i for i, number in enumerate(sorted({number for some in pairs.values() for number in some.rows}))}
    values_NS = np.zeros((len(rows), 3 * len(hits)))  # of each language: found to, found from, and 1
    for column, (language, hits_N3) in enumerate(hits.items()):
        places_n = [rows[number] for number in pairs[language].rows]
        values_NS[places_n, 3 * column : 3 * column + 3] = np.c_[hits_N3[:, :2], np.ones(len(hits_N3))]
    sums_RL3 = bootstrap(values_NS).reshape(-1, len(hits), 3)
    with np.errstate(invalid="ignore"):  # of a language that a resample does not have
        return np.nanmean(sums_RL3[..., :2] / sums_RL3[..., 2:], axis=1)
