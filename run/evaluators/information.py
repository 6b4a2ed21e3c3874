"""Lower bounds of the mutual information of images and captions, as an objective's model of the pairs gives them.

InfoNCE's bound (arXiv 1807.03748, section 2.3): for any score f(x, t) of a pair, and K pairs drawn independently,
I(X; T) >= ln K + E[ln softmax of f over the K images, at a caption's own]. It never exceeds ln K, and it is a bound:
that of a model with a poor score lies far below the information that its features hold. Two scores:
  - embeddings: scale · cosine, whose scale is chosen on the groups of even number and used on the others;
  - captions: the log-likelihood of the caption given the image, whose part that no image explains cancels.
The reconstruction bound (Barber and Agakov, NeurIPS 2003), that of objectives which write captions, has no such limit:
I(X; T) >= H(T) + E[ln p(t | x)]. The entropy H(T) of the captions is not known, but is the same for all models: what is
logged is the rest, `information - H(T)/captions`, whose differences between models of one tokenizer can be compared.
Dimension letters: K pairs of a group, E size of an embedding.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mug.model.objectives.objective import EmbedsPairs, Objective, ScoresCaptions
from mug.run.common.command_line import check_min
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import EvalContext, Evaluator, Result, Subject
from mug.run.evaluators.held_out_pairs import Pair, PairsConfig, images_of, name_of_pairs, open_pairs
from mug.run.evaluators.sharing import gather_numbered, share
from mug.run.evaluators.zero_shot import embed_texts

SCALES = tuple(2.0**power for power in range(9))  # of the cosine: 1 to 256

Scores = dict[str, Tensor]  # score → fp32 [K, K]: of each image (row) and each caption (column) of a group


@dataclass(frozen=True)
class InformationConfig(PairsConfig):
    """Bounds of the mutual information of images and captions.

    Args:
        candidates: pairs of a group, among which a caption's own image is to be found.
    """

    limit: int = 1024
    candidates: int = 64

    def check(self) -> None:
        super().check()
        check_min(self, {"candidates": 2})
        if self.limit < 2 * self.candidates:
            raise RunError(f"limit {self.limit} must be at least two groups of {self.candidates} candidates")


class Information(Evaluator):
    """`information/embeddings`, `information/captions` and `information - H(T)/captions`, as far as the objective is
    able: lower bounds in nats, over groups of a fixed number of pairs. The ranks share the groups."""

    Config = InformationConfig

    def __init__(self, config: InformationConfig, context: EvalContext):
        super().__init__(config, context)
        self.pairs = open_pairs(config, context)

    @classmethod
    def suits(cls, objective: type[Objective]) -> bool:
        return issubclass(objective, EmbedsPairs | ScoresCaptions)

    def check(self, objective: Any) -> None:
        if isinstance(objective, ScoresCaptions):
            objective.check_captions()
        elif not isinstance(objective, EmbedsPairs):
            raise RunError("evaluation information needs an objective that embeds pairs or scores captions")

    def run(self, subject: Subject) -> Result:
        groups = len(self.pairs) // self.config.candidates
        if groups < 2:
            raise RunError(f"{len(self.pairs)} pairs are fewer than two groups; lower `candidates`")
        mine = [(group, self._scores(subject.whole, group)) for group in share(groups)]
        found = gather_numbered(mine)
        self.pairs.report()
        metrics = {}
        if "captions" in found[0]:
            metrics["information/captions"] = float(np.mean([lower_bound(one["captions"]) for one in found]))
            own = torch.cat([one["captions"].diagonal() for one in found])
            metrics["information - H(T)/captions"] = own.double().mean().item()
        if "embeddings" in found[0]:
            metrics["information/embeddings"] = scaled_bound([one["embeddings"] for one in found])
        about = {"method": "information, lower bound", "encoder": self.encoder_name(subject)}
        about |= {"data": name_of_pairs(self.config), "setting": f"{self.config.candidates} candidates"}
        return Result(metrics, [about | {"pairs": groups * self.config.candidates} | metrics])

    @torch.inference_mode()
    def _scores(self, objective: Objective, group: int) -> Scores:
        """Returns the scores of the group's images and captions, on the CPU; pairs without a caption are skipped."""
        self.context.progress(f"information, group {group}")
        first, K = group * self.config.candidates, self.config.candidates
        pairs = self.pairs.read(range(first, first + K), objective.config.image_size)
        return scores(objective, [pair for pair in pairs if pair.captions], self.context)


def scores(objective: Any, pairs: list[Pair], context: EvalContext) -> Scores:
    """Returns each score that the objective has."""
    images, texts, found = images_of(pairs), [pair.captions[0] for pair in pairs], {}
    tokenizer: Any = context.tokenizer
    embeds, writes = (isinstance(objective, ability) for ability in (EmbedsPairs, ScoresCaptions))
    if embeds:
        image_KE = objective.embed_image(images).float().cpu()
        found["embeddings"] = image_KE @ embed_texts(objective, tokenizer, texts, context.micro_batch).T
    if writes:
        tokens = np.stack([tokenizer.encode(text, objective.config.text_length) for text in texts])
        tokens_KT = torch.from_numpy(tokens).to(images.device)
        found["captions"] = objective.caption_log_likelihoods(images, tokens_KT).float().cpu()
    return found


def lower_bound(scores_KK: Tensor) -> float:
    """Returns InfoNCE's lower bound in nats; own pairs are on the diagonal."""
    own_K = scores_KK.double().log_softmax(0).diagonal()
    return math.log(len(own_K)) + own_K.mean().item()


def scaled_bound(cosines: list[Tensor]) -> float:
    """Returns the mean bound of the groups of odd number, with the scale that is best on the others."""
    bounds = {scale: [lower_bound(scale * one) for one in cosines] for scale in SCALES}
    best = max(SCALES, key=lambda scale: sum(bounds[scale][::2]))
    return float(np.mean(bounds[best][1::2]))
