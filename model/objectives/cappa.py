"""CapPa (arXiv 2306.07915): a decoder writes the caption of the entire image, word by word or all words in parallel.

Where the authors differ: their encoder has no class token, their decoder no biases. Their decoder predicts in parallel
without a causal mask, of captions padded to one length; here, where captions are packed, the mask stays causal, as
without it the number of masks would reveal how long the caption is. Dimension letters: B batch, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mug.model.captioner import Captioner
from mug.model.captioning import CaptionTask
from mug.model.keyed_random import PARALLEL, random_bits
from mug.model.objectives.objective import Batch, Context, ObjectiveError
from mug.model.presets import ModelConfigError, TextDecoderConfig


@dataclass(frozen=True)
class CapPaConfig(TextDecoderConfig):
    """Sizes of an encoder and of a decoder that writes the caption.

    Args:
        text_unimodal_layers: text blocks that see only text; the authors have none.
        tied_head: one matrix for token embedding and caption head; the authors have two.
        parallel_share: share of the samples whose decoder sees masks instead of words; 0 is Cap.
    """

    text_unimodal_layers: int = 0
    tied_head: bool = False
    parallel_share: float = 0.75

    def check(self) -> None:
        super().check()
        if not 0 <= self.parallel_share <= 1:
            raise ModelConfigError(f"model.parallel_share must lie between 0 and 1, not be {self.parallel_share}")


class CapPa(Captioner):
    """A captioner whose position also decides, with the seed, which captions are predicted in parallel."""

    Config = CapPaConfig

    def __init__(self, config: CapPaConfig, context: Context):
        super().__init__(config, context)
        if config.parallel_share and self.vocabulary.mask is None:
            raise ModelConfigError("model.parallel_share needs a tokenizer with a mask token; or set it to 0")

    def task(self, batch: Batch) -> CaptionTask:
        task = super().task(batch)
        if not self.config.parallel_share:
            return task
        assert self.vocabulary.mask is not None  # checked above
        hidden_B1 = self.in_parallel(batch["position"])[:, None]
        return task._replace(inputs=torch.where(hidden_B1, self.vocabulary.mask, task.inputs))

    def in_parallel(self, position_B: Tensor) -> Tensor:
        """Returns bool [B]: the captions to predict in parallel (section 3), by (seed, position)."""
        draw_B = random_bits(self.context.seed, PARALLEL, position_B, 1)[:, 0].double() / 2.0**63
        return draw_B < self.config.parallel_share

    def check_captions(self) -> None:
        if self.config.parallel_share == 1:
            raise ObjectiveError("the model never learned to write word by word: its model.parallel_share is 1")
