"""Zero-shot classification by captions, for objectives that write captions and embed none.

Of the classes' names, which is the likeliest text of the image (CapPa, arXiv 2306.07915, section 3.3)? A weak model
answers every image by the name that is likely of any. So the other question is asked as well: given which name is the
image the likeliest? By Bayes' rule p(x | t) is p(t | x) / p(t) times what all names share; p(t) is the mean over the
images. Dimension letters: M images, C classes, K templates, T tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mug.data.store.expand import without_signatures
from mug.model.objectives.objective import ScoresCaptions
from mug.run.cluster import hardware
from mug.run.evaluators.evaluator import Result, Subject
from mug.run.evaluators.features import Features, extract_shared
from mug.run.evaluators.zero_shot import ZeroShot, ZeroShotConfig


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig(ZeroShotConfig):
    """Images to classify by how likely captions with the names of the classes are; over templates, probabilities add.
    Each class costs a pass of the text decoder for each image and template."""


class CaptionScores(nn.Module):
    """The log-likelihoods of C x K captions given an image, as its log-likelihood of each class."""

    def __init__(self, objective: Any, tokens_CKT: Tensor):
        super().__init__()
        self.objective, self.size, self.tokens_CKT = objective, objective.config.image_size, tokens_CKT

    def forward(self, image_BCHW: Tensor) -> Features:
        scores = self.objective.caption_log_likelihoods(image_BCHW, self.tokens_CKT.flatten(0, 1))
        return {"log-likelihood": scores.unflatten(1, self.tokens_CKT.shape[:2]).logsumexp(2)}


class LikelihoodZeroShot(ZeroShot):
    """`accuracy/zero shot by likelihood` of the name, and `… of the image`: top-1. The ranks share the images."""

    Config = LikelihoodConfig
    needs = ScoresCaptions

    def check(self, objective: Any) -> None:
        super().check(objective)
        objective.check_captions()

    def run(self, subject: Subject) -> Result:
        objective = subject.whole
        tokenizer: Any = self.context.tokenizer
        texts = [template.replace("{}", name) for name in self.names.values() for template in self.config.templates]
        tokens = np.stack([tokenizer.encode(text, objective.config.text_length) for text in texts])
        tokens_CKT = torch.from_numpy(tokens).unflatten(0, (len(self.names), -1)).to(hardware.device())
        score_MC = extract_shared(CaptionScores(objective, tokens_CKT), self.images, self.context)["log-likelihood"]
        numbers = {label: number for number, label in enumerate(self.names)}
        true_M = torch.tensor([numbers[label] for label in self.images.labels])
        of_image_MC = score_MC - score_MC.logsumexp(0)
        metrics = {
            f"accuracy/zero shot by likelihood{of}": (one_MC.argmax(1) == true_M).double().mean().item()
            for of, one_MC in (("", score_MC), (" of the image", of_image_MC))
        }
        about = {"method": "zero shot by likelihood", "encoder": self.encoder_name(subject)}
        about |= {"data": without_signatures(self.config.data), "test_images": len(true_M)}
        return Result(metrics, [about | {"setting": f"{len(self.config.templates)} template(s)"} | metrics])
