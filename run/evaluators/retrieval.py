"""Images found by their captions, and captions by their images, as CLIP is evaluated on COCO and Flickr30k.

Dimension letters: N images, M captions, E size of an embedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mug.model.objectives.objective import EmbedsPairs, Objective
from mug.run.cluster import hardware
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import EvalContext, Evaluator, Result, Subject
from mug.run.evaluators.features import fast_products
from mug.run.evaluators.held_out_pairs import PairsConfig, images_of, name_of_pairs, open_pairs
from mug.run.evaluators.sharing import share, sum_over_ranks
from mug.run.evaluators.zero_shot import embed_texts

RECALLS = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalConfig(PairsConfig):
    """Retrieval among image-text pairs; all captions of a pair in the run's languages are its own."""


class Retrieval(Evaluator):
    """recall@1, @5 and @10, `recall@K/image to text` and `recall@K/text to image`.

    An image has found its text if one of its captions is among the K nearest; ties with other captions count against
    it. Pairs without a caption are passed over. The ranks share the encoding and the comparing.
    """

    Config = RetrievalConfig
    needs = EmbedsPairs

    def __init__(self, config: RetrievalConfig, context: EvalContext):
        super().__init__(config, context)
        self.pairs = open_pairs(config, context)

    def run(self, subject: Subject) -> Result:
        embedded = sorted(hardware.gather(list(self._embed_share(subject.whole))), key=lambda one: one[0])
        self.pairs.report()
        if not embedded:
            raise RunError(f"none of the pairs of {name_of_pairs(self.config)} has a caption; choose other `shards`")
        image_NE = torch.stack([image_E for _, image_E, _ in embedded])
        text_ME = torch.cat([text_KE for *_, text_KE in embedded])
        owner_M = torch.arange(len(embedded)).repeat_interleave(torch.tensor([len(text) for *_, text in embedded]))
        metrics = recalls(image_NE, text_ME, owner_M)
        about = {"method": "retrieval", "encoder": self.encoder_name(subject), "data": name_of_pairs(self.config)}
        return Result(metrics, [about | {"images": len(image_NE), "captions": len(text_ME)} | metrics])

    @torch.inference_mode()
    def _embed_share(self, objective: Objective) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Returns number, image [E] and captions [K, E] of each of this rank's pairs, fp32 on the CPU."""
        batch = self.context.micro_batch
        for pairs in self.pairs.captioned_share(objective.config.image_size, batch):
            self.context.progress(f"retrieval, pair {pairs[0].number:,} of {len(self.pairs):,}")
            with fast_products(hardware.device()):
                image_BE = objective.embed_image(images_of(pairs)).float().cpu()
                texts = [caption for pair in pairs for caption in pair.captions]
                text_ME = embed_texts(objective, self.context.tokenizer, texts, batch)
            texts_of_each = text_ME.split([len(pair.captions) for pair in pairs])
            yield from zip([pair.number for pair in pairs], image_BE, texts_of_each, strict=True)


def recalls(image_NE: Tensor, text_ME: Tensor, owner_M: Tensor) -> dict[str, float]:
    """Returns the metrics of embeddings that all ranks hold; each compares its share of them. A collective call.

    owner_M: int64, the image that a caption belongs to.
    """
    images, texts = torch.tensor([*share(len(image_NE))]).long(), torch.tensor([*share(len(text_ME))]).long()
    own_nM = owner_M == images[:, None]
    own_mN = torch.arange(len(image_NE)) == owner_M[texts][:, None]
    found = {"image to text": places(image_NE[images] @ text_ME.T, own_nM)}
    found["text to image"] = places(text_ME[texts] @ image_NE.T, own_mN)
    names = [(k, way) for way in found for k in RECALLS]
    hits = sum_over_ranks(torch.stack([(found[way] < k).sum() for k, way in names]))
    totals = {"image to text": len(image_NE), "text to image": len(text_ME)}
    return {f"recall@{k}/{way}": count / totals[way] for (k, way), count in zip(names, hits, strict=True)}


def places(similarity_QC: Tensor, own_QC: Tensor) -> Tensor:
    """Returns int64 [Q]: how many candidates of others are at least as near a query as the nearest of its own."""
    best_Q1 = similarity_QC.masked_fill(~own_QC, -torch.inf).amax(1, keepdim=True)
    return ((similarity_QC >= best_Q1) & ~own_QC).sum(1)
