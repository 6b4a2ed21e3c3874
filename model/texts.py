"""Texts as sources and as targets, and what tasks make of them.

A source is BOS X EOS LANGUAGE PAD, as an encoder reads it; a target LANGUAGE X EOS PAD, as a decoder writes it (mBART,
arXiv 2001.08210, with BOS in addition, whose state stands for the text). Of a tokenizer without languages both are
BOS X EOS PAD. A row of PAD alone is not a text. Dimension letters: B batch, T tokens, M samples of the group.
"""

import torch
from torch import Tensor

from mug.model.keyed_random import MISMATCH, SPLIT, random_bits
from mug.model.presets import Vocabulary


def lengths_of(tokens_BT: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Returns int64 [B], the tokens that are not padding."""
    return (tokens_BT != vocabulary.pad).sum(1)


def as_target(tokens_BT: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Returns sources as targets, [B, T]."""
    if not vocabulary.language_ids:
        return tokens_BT
    last_B1 = (lengths_of(tokens_BT, vocabulary) - 1).clamp(min=0)[:, None]
    words_BT = tokens_BT.scatter(1, last_B1, vocabulary.pad)
    return torch.cat([tokens_BT.gather(1, last_B1), words_BT[:, 1:]], dim=1)


def as_source(tokens_BT: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Returns targets as sources, [B, T + 1]: they are one token longer."""
    padded_BT = torch.nn.functional.pad(tokens_BT, (0, 1), value=vocabulary.pad)
    if not vocabulary.language_ids:
        return padded_BT
    lengths_B = lengths_of(tokens_BT, vocabulary)
    bos_B = torch.where(lengths_B > 0, vocabulary.bos, vocabulary.pad)
    named_BT = padded_BT.scatter(1, lengths_B[:, None], tokens_BT[:, :1])
    return torch.cat([bos_B[:, None], named_BT[:, 1:]], dim=1)


def split_prefix(tokens_BT: Tensor, position_B: Tensor, vocabulary: Vocabulary, seed: int) -> tuple[Tensor, Tensor]:
    """Returns sources cut in two, (source, target) [B, T] each: the prefix has 20% of the words, rounded down, or, with
    probability ½ by (seed, position), none (UniX², section 3.2.2, PLM). Both keep EOS and language."""
    ends = 3 if vocabulary.language_ids else 2
    words_B1 = (lengths_of(tokens_BT, vocabulary) - ends).clamp(min=0)[:, None]
    prefix_B1 = random_bits(seed, SPLIT, position_B, 1) % 2 * (words_B1 // 5)
    place_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    kept_BT = torch.where(place_T <= prefix_B1, place_T, place_T + words_B1 - prefix_B1)
    written_BT = torch.where(place_T < 1, place_T, place_T + prefix_B1)
    padded_BT = torch.nn.functional.pad(tokens_BT, (0, 1), value=vocabulary.pad)
    prefix_BT, suffix_BT = (padded_BT.gather(1, place.clamp(max=len(place_T))) for place in (kept_BT, written_BT))
    return prefix_BT, as_target(suffix_BT, vocabulary)


def hard_negatives(
    logits_BM: Tensor,
    tokens_BT: Tensor,
    position_B: Tensor,
    group_MT: Tensor,
    group_position_M: Tensor,
    pad: int,
    seed: int,
) -> Tensor:
    """Returns [B, T]: the samples' texts, half of them, the same as by `mismatched`, replaced by one of another sample.

    It is drawn by (seed, position) from the softmax of the logits, without the sample's own text and those equal to it
    (ALBEF, arXiv 2107.07651, section 3.2). The result does not depend on the order of the group.
    """
    order_M = group_position_M.argsort()
    group_MT, logits_BM = group_MT[order_M], logits_BM[:, order_M].double()
    other_BM = (tokens_BT[:, None] != group_MT).any(2) & (group_MT[:, 0] != pad)
    ends_BM = logits_BM.masked_fill(~other_BM, -torch.inf).softmax(1).cumsum(1)  # of each text's share of [0, 1)
    draw_B2 = random_bits(seed, MISMATCH, position_B, 2)
    point_B1 = draw_B2[:, 1:] % 2**53 / 2.0**53 * ends_BM[:, -1:]
    choice_B = torch.searchsorted(ends_BM, point_B1, right=True)[:, 0].clamp(max=len(group_MT) - 1)
    replaced_B = (draw_B2[:, 0] % 2 == 1) & (tokens_BT[:, 0] != pad) & other_BM.any(1)
    return torch.where(replaced_B[:, None], group_MT[choice_B], tokens_BT)


def mismatched(
    tokens_BT: Tensor, position_B: Tensor, group_MT: Tensor, group_position_M: Tensor, pad: int, seed: int
) -> Tensor:
    """Returns [B, T]: the samples' texts, half of them, by (seed, position), replaced by one of another sample.

    The result depends on which samples the group has, not on their order. A sample that draws a text equal to its own
    is matched; one without text keeps none, and is drawn by none.
    """
    order_M = group_position_M.argsort()
    order_M = order_M[group_MT[order_M, 0] != pad]
    if not len(order_M):
        return tokens_BT
    own_B = torch.searchsorted(group_position_M[order_M], position_B)
    draw_B2 = random_bits(seed, MISMATCH, position_B, 2)
    other_B = (own_B + 1 + draw_B2[:, 1] % max(len(order_M) - 1, 1)) % len(order_M)
    replaced_B = (draw_B2[:, 0] % 2 == 1) & (tokens_BT[:, 0] != pad)
    return torch.where(replaced_B[:, None], group_MT[order_M[other_B]], tokens_BT)
