"""The two ways to learn a caption: write it from left to right, or fill in masked words.

Dimension letters: B batch, T tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mug.model.presets import Vocabulary
from mug.model.random_choices import WORD_KIND, WORDS, random_bits

MASKED_PERCENT = 15  # BERT, arXiv 1810.04805, section 3.1: of these 80% become MASK, 10% a random word


class CaptionTask(NamedTuple):
    """inputs, targets: int64 [B, T], PAD where there is nothing to predict; lengths_B: int64 [B], tokens but PAD."""

    inputs: Tensor
    targets: Tensor
    causal: bool
    lengths_B: Tensor


Captioning = Callable[[Tensor, Tensor, Vocabulary, int], CaptionTask]


def autoregressive(tokens_BT: Tensor, position_B: Tensor, vocabulary: Vocabulary, seed: int) -> CaptionTask:
    """Each token predicts the next one; the last has no target, which keeps T whole for the kernels."""
    targets_BT = torch.nn.functional.pad(tokens_BT[:, 1:], (0, 1), value=vocabulary.pad)
    return CaptionTask(tokens_BT, targets_BT, causal=True, lengths_B=_lengths(tokens_BT, vocabulary))


def _lengths(tokens_BT: Tensor, vocabulary: Vocabulary) -> Tensor:
    return (tokens_BT != vocabulary.pad).sum(1)


def masked_language(tokens_BT: Tensor, position_B: Tensor, vocabulary: Vocabulary, seed: int) -> CaptionTask:
    """BERT's objective: 15% of the words are hidden, chosen by (seed, position), and predicted from both sides."""
    B, T = tokens_BT.shape
    specials = torch.tensor([vocabulary.pad, vocabulary.bos, vocabulary.eos], device=tokens_BT.device)
    word_BT = ~torch.isin(tokens_BT, specials)
    draw_BT = random_bits(seed, WORDS, position_B, T).masked_fill(~word_BT, torch.iinfo(torch.int64).max)
    # At least one word of every caption that has words, so that no caption is without a target.
    words_B = word_BT.sum(1)
    count_B = ((words_B * MASKED_PERCENT + 50) // 100).clamp(min=1).minimum(words_B)
    chosen_BT = (draw_BT.argsort(1).argsort(1) < count_B[:, None]) & word_BT
    kind_BT = random_bits(seed, WORD_KIND, position_B, 2 * T).view(B, 2, T)
    tenth_BT, random_word_BT = kind_BT[:, 0] % 10, kind_BT[:, 1] % vocabulary.size
    inputs_BT = torch.where(chosen_BT & (tenth_BT < 8), vocabulary.mask, tokens_BT)
    inputs_BT = torch.where(chosen_BT & (tenth_BT == 8), random_word_BT, inputs_BT)
    targets_BT = tokens_BT.masked_fill(~chosen_BT, vocabulary.pad)
    return CaptionTask(inputs_BT, targets_BT, causal=False, lengths_B=_lengths(tokens_BT, vocabulary))


FUNCTIONS: dict[str, Captioning] = {"autoregressive": autoregressive, "masked-language": masked_language}
