"""How likely captions are, by a decoder that writes them.

Dimension letters: B images, C captions, T tokens, L encoded image tokens, V vocabulary.
"""

import torch
from torch import Tensor

from mug.model.generate import Decoder


def log_likelihoods(decoder: Decoder, pad: int, memory_BLD: Tensor, tokens_CT: Tensor) -> Tensor:
    """Returns fp32 [B, C]: the log-probability of each caption's tokens after BOS, EOS too, given each image.

    Args:
        decoder: called without caches; returns the states of the tokens last.
        memory_BLD: the encoder's output.
        tokens_CT: int64, BOS … EOS PAD.
    """
    found = []
    for tokens_T in tokens_CT:  # one caption of all images at a time: none is padded
        text_BT = tokens_T[tokens_T != pad].expand(len(memory_BLD), -1)
        inputs_BT, target_BT = text_BT[:, :-1].contiguous(), text_BT[:, 1:]
        hidden_BTD = decoder(inputs_BT, memory_BLD)[:, -target_BT.shape[1] :]  # some have the image's states first
        logits_BTV = decoder.head(hidden_BTD).float()
        log_p_BT = logits_BTV.log_softmax(-1).gather(2, target_BT[..., None])[..., 0]
        found.append(log_p_BT.sum(1))
    return torch.stack(found, dim=1)
