"""Images found by their captions, and captions by their images, as CLIP is evaluated on COCO and Flickr30k; in each of
several languages, as UniX² is on Multi30k.

Dimension letters: N images, M captions, Q queries, C candidates, K of recall@K, E size of an embedding.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mug.data.captions import TEXT_LANGUAGE
from mug.data.config import DataConfig
from mug.model.objectives.objective import EmbedsPairs
from mug.run.cluster import hardware
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import EvalContext, Evaluator, Result, Subject
from mug.run.evaluators.features import fast_products
from mug.run.evaluators.held_out_pairs import Pair, PairsConfig, check_tokens, images_of, name_of_pairs, open_pairs
from mug.run.evaluators.intervals import bootstrap, interval
from mug.run.evaluators.sharing import gather_rows, share
from mug.run.evaluators.zero_shot import embed_texts

RECALLS = (1, 5, 10)
WAYS = ("image to text", "text to image")
NAMES = tuple(f"recall@{k}/{way}" for way in WAYS for k in RECALLS)
ALL = ""  # stands for a language where captions of all are candidates together


@dataclass(frozen=True)
class RetrievalConfig(PairsConfig):
    """Retrieval among image-text pairs; all captions of a pair in a language are its own.

    Args:
        languages: languages of the captions, 'en,de', each of which is searched by itself; without it, the run's if
            the tokenizer has language tokens, else captions in any of the run's languages together.
    """

    languages: str | None = None

    def check(self) -> None:
        super().check()
        DataConfig(language=self.languages or TEXT_LANGUAGE)  # raises if one is empty


class Embedded(NamedTuple):
    """A pair: its number, its image, fp32 [E], and language → its captions, fp32 [K, E]; on the CPU."""

    number: int
    image_E: Tensor
    texts: dict[str, Tensor]


class Retrieval(Evaluator):
    """`recall@K/image to text` and `recall@K/text to image` for K of 1, 5 and 10, their mean `mean recall`, and
    `mean recall/chance`; of several languages the means over these, and `mean recall/LANGUAGE` of each.

    An image has found its text if one of its captions is among the K nearest; ties with other captions count against
    it. Pairs without a caption are passed over. The ranks share the encoding and the comparing. Intervals of the mean
    recall are over the draw of the images.
    """

    Config = RetrievalConfig
    needs = EmbedsPairs

    def __init__(self, config: RetrievalConfig, context: EvalContext):
        super().__init__(config, context)
        apart = config.languages or (context.tokenizer and context.tokenizer.languages)
        if config.languages:
            check_tokens(DataConfig(language=config.languages).languages(), context, "retrieval.languages")
        self.pairs = open_pairs(config, context, config.languages)
        self.languages = self.pairs.languages if apart else (ALL,)

    def run(self, subject: Subject) -> Result:
        embedded = sorted(hardware.gather(list(self._embed_share(subject.whole))), key=lambda one: one.number)
        self.pairs.report()
        found = {language: self._compare(embedded, language) for language in self.languages}
        sums_R8 = np.split(bootstrap(np.concatenate([*found.values()], axis=1)), len(found), axis=1)
        means = {language: recalls(sums).mean(-1) for language, sums in zip(found, sums_R8, strict=True)}
        about = {"method": "retrieval", "encoder": self.encoder_name(subject), "data": name_of_pairs(self.config)}
        rows = {language: metrics_of(hits_N8) for language, hits_N8 in found.items()}
        records = [
            about
            | ({"setting": language} if language else {})
            | {"images": int(found[language][:, 3].sum()), "captions": int(found[language][:, 7].sum())}
            | row
            | {"mean recall interval": interval(means[language])}
            for language, row in rows.items()
        ]
        metrics = {name: float(np.mean([row[name] for row in rows.values()])) for name in rows[self.languages[0]]}
        if ALL not in found:
            over = interval(np.mean([*means.values()], axis=0))
            records.append(about | {"setting": "mean over languages"} | metrics | {"mean recall interval": over})
            metrics |= {f"mean recall/{language}": row["mean recall"] for language, row in rows.items()}
        return Result(metrics, records)

    @torch.inference_mode()
    def _embed_share(self, objective: Any) -> Iterator[Embedded]:
        """Yields this rank's pairs."""
        batch, tokenizer = self.context.micro_batch, self.context.tokenizer
        assert tokenizer is not None  # of the captions that it learned
        for pairs in self.pairs.captioned_share(objective.config.image_size, batch):
            self.context.progress(f"retrieval, pair {pairs[0].number:,} of {len(self.pairs):,}")
            with fast_products(hardware.device()):
                image_BE = objective.embed_image(images_of(pairs)).float().cpu()
                texts: list[dict[str, Tensor]] = [{} for _ in pairs]
                for language in self.languages:
                    captions = [self._captions(pair, language) for pair in pairs]
                    if flat := [*itertools.chain.from_iterable(captions)]:
                        of = language or TEXT_LANGUAGE
                        text_ME = embed_texts(objective, tokenizer, flat, batch, of)
                        parts = text_ME.split([len(some) for some in captions])
                        for found, text_KE in zip(texts, parts, strict=True):
                            found |= {language: text_KE} if len(text_KE) else {}
            numbers = [pair.number for pair in pairs]
            yield from (Embedded(*one) for one in zip(numbers, image_BE, texts, strict=True))

    def _captions(self, pair: Pair, language: str) -> list[str]:
        return pair.captions if language == ALL else pair.texts.get(language, [])

    def _compare(self, embedded: list[Embedded], language: str) -> np.ndarray:
        """Returns `hits` of the pairs in a language, float64 [N, 8], 0 for those that have no caption in it.

        Raises:
            RunError: none has one.
        """
        having = [i for i, one in enumerate(embedded) if language in one.texts]
        if not having:
            named = f" in {language}" if language else ""
            raise RunError(f"none of the pairs of {name_of_pairs(self.config)} has a caption{named}; choose others")
        hits_N8 = np.zeros((len(embedded), 8))
        texts = [embedded[i].texts[language] for i in having]
        owner_M = torch.arange(len(having)).repeat_interleave(torch.tensor([len(text) for text in texts]))
        hits_N8[having] = hits(torch.stack([embedded[i].image_E for i in having]), torch.cat(texts), owner_M)
        return hits_N8


def hits(image_NE: Tensor, text_ME: Tensor, owner_M: Tensor) -> np.ndarray:
    """Returns float64 [N, 8] of embeddings that all ranks hold; each compares its share of them. A collective call.

    Of each image whether it found a caption within 1, 5 and 10, and 1; then how many of its captions found it within
    1, 5 and 10, and how many it has.

    owner_M: int64, the image that a caption belongs to.
    """
    images, texts = torch.tensor([*share(len(image_NE))]).long(), torch.tensor([*share(len(text_ME))]).long()
    own_nM, own_mN = owner_M == images[:, None], torch.arange(len(image_NE)) == owner_M[texts][:, None]
    place_N = gather_rows(places(image_NE[images] @ text_ME.T, own_nM), len(image_NE))
    place_M = gather_rows(places(text_ME[texts] @ image_NE.T, own_mN), len(text_ME))
    found_N4, found_M4 = (
        torch.cat([place[:, None] < torch.tensor(RECALLS), torch.ones(len(place), 1)], dim=1).double()
        for place in (place_N, place_M)
    )
    return torch.cat([found_N4, torch.zeros_like(found_N4).index_add(0, owner_M, found_M4)], dim=1).numpy()


def recalls(hits_X8: np.ndarray) -> np.ndarray:
    """Returns the six recalls, float64 [..., 6] as NAMES, of sums over `hits`."""
    both = hits_X8.reshape(*hits_X8.shape[:-1], 2, 4)
    with np.errstate(invalid="ignore"):  # of a language that a resample does not have
        return (both[..., :3] / both[..., 3:]).reshape(*hits_X8.shape[:-1], 6)


def metrics_of(hits_N8: np.ndarray) -> dict[str, float]:
    """Returns the six recalls, their mean, and what that is by chance."""
    found_6 = recalls(hits_N8.sum(0))
    metrics = dict(zip(NAMES, found_6.tolist(), strict=True))
    captions_N = hits_N8[hits_N8[:, 3] > 0, 7].astype(int).tolist()
    return metrics | {"mean recall": float(found_6.mean()), "mean recall/chance": chance(captions_N)}


def chance(captions_N: Sequence[int]) -> float:
    """Returns the mean recall that a random order is expected to have, of images with so many captions each."""
    N, M = len(captions_N), sum(captions_N)
    none = [sum(math.comb(M - own, k) for own in captions_N) / N / math.comb(M, k) for k in RECALLS if k <= M]
    by_image = [1 - some for some in none] + [1.0] * (len(RECALLS) - len(none))
    return float(np.mean(by_image + [min(k, N) / N for k in RECALLS]))


def places(similarity_QC: Tensor, own_QC: Tensor) -> Tensor:
    """Returns int64 [Q]: how many candidates of others are at least as near a query as the nearest of its own."""
    best_Q1 = similarity_QC.masked_fill(~own_QC, -torch.inf).amax(1, keepdim=True)
    return ((similarity_QC >= best_Q1) & ~own_QC).sum(1)
