"""The ways to learn a caption: write it from left to right, or fill in masked words; and the loss of doing so.

Dimension letters: B batch, T tokens, R tokens of all captions packed, K of them with a target, L encoded image tokens,
D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mug.model.keyed_random import WORD_KIND, WORDS, random_bits
from mug.model.objectives.objective import Batch, with_tensors
from mug.model.presets import Vocabulary
from mug.model.text_decoder import TextDecoder, pack, packed_rows
from mug.model.texts import lengths_of

MASKED_PERCENT = 15  # BERT, arXiv 1810.04805, section 3.1: of these 80% become MASK, 10% a random word


class CaptionTask(NamedTuple):
    """A task. inputs, targets: int64 [B, T], PAD where nothing is predicted; lengths_B: int64 [B], without PAD."""

    inputs: Tensor
    targets: Tensor
    causal: bool
    lengths_B: Tensor


Captioning = Callable[[Tensor, Tensor, Vocabulary, int], CaptionTask]


def autoregressive(tokens_BT: Tensor, position_B: Tensor, vocabulary: Vocabulary, seed: int) -> CaptionTask:
    """Each token predicts the next one; the last has no target, which keeps T unchanged for the kernels."""
    targets_BT = torch.nn.functional.pad(tokens_BT[:, 1:], (0, 1), value=vocabulary.pad)
    return CaptionTask(tokens_BT, targets_BT, causal=True, lengths_B=lengths_of(tokens_BT, vocabulary))


def words_of(tokens_BT: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Returns bool [B, T], True where a token is neither BOS nor EOS nor PAD nor a language."""
    word_BT = (tokens_BT != vocabulary.pad) & (tokens_BT != vocabulary.bos) & (tokens_BT != vocabulary.eos)
    for language in vocabulary.language_ids:  # on the host, where a tensor of them would make it wait for a GPU
        word_BT &= tokens_BT != language
    return word_BT


def masked_language(tokens_BT: Tensor, position_B: Tensor, vocabulary: Vocabulary, seed: int) -> CaptionTask:
    """BERT's objective: 15% of the words are hidden, chosen by (seed, position), and predicted from both sides."""
    B, T = tokens_BT.shape
    word_BT = words_of(tokens_BT, vocabulary)
    draw_BT = random_bits(seed, WORDS, position_B, T).masked_fill(~word_BT, torch.iinfo(torch.int64).max)
    # At least one word of every caption that has words, so that no caption is without a target.
    words_B = word_BT.sum(1)
    count_B = ((words_B * MASKED_PERCENT + 50) // 100).clamp(min=1).minimum(words_B)
    chosen_BT = (draw_BT.argsort(1).argsort(1) < count_B[:, None]) & word_BT
    kind_BT = random_bits(seed, WORD_KIND, position_B, 2 * T).view(B, 2, T)
    tenth_BT, random_word_BT = kind_BT[:, 0] % 10, kind_BT[:, 1] % vocabulary.size
    assert vocabulary.mask is not None  # an objective that uses this has checked
    inputs_BT = torch.where(chosen_BT & (tenth_BT < 8), vocabulary.mask, tokens_BT)
    inputs_BT = torch.where(chosen_BT & (tenth_BT == 8), random_word_BT, inputs_BT)
    targets_BT = tokens_BT.masked_fill(~chosen_BT, vocabulary.pad)
    return CaptionTask(inputs_BT, targets_BT, causal=False, lengths_B=lengths_of(tokens_BT, vocabulary))


def with_rows(batch: Batch, task: CaptionTask, pad: int) -> Batch:
    """Returns the batch with which tokens there are, and which to predict: int64 `packed_rows` [R], places among the
    B·T tokens, and `kept_rows` [K], places among these R. On a GPU the host waits for both."""
    row_R = packed_rows(task.lengths_B, task.inputs.shape[1])
    kept_K = (task.targets.flatten()[row_R] != pad).nonzero().squeeze(1)
    return with_tensors(batch, {"packed_rows": row_R, "kept_rows": kept_K})


def caption_loss(decoder: TextDecoder, task: CaptionTask, memory_BLD: Tensor, prepared: Batch) -> tuple[Tensor, Tensor]:
    """Returns (loss, accuracy) of the targets, given the encoded image; `prepared` by `with_rows`."""
    packing = pack(task.lengths_B, task.inputs.shape[1], memory_BLD.shape[1], prepared["packed_rows"])
    hidden_RD = decoder(task.inputs, memory_BLD, causal=task.causal, packing=packing)
    return decoder.head(hidden_RD, task.targets.flatten()[packing.row_R], prepared["kept_rows"])


FUNCTIONS: dict[str, Captioning] = {"autoregressive": autoregressive, "masked-language": masked_language}
