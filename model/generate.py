"""Write captions with the text decoder, and reconstruct the masked patches.

Dimension letters: B batch, T tokens, L encoded image tokens, V vocabulary, K beams.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mug.kernels.masked_patch_loss import gather_patches, normalize_channels, patch_statistics, patchify
from mug.model.encoder import PIXEL_MEAN, PIXEL_STD
from mug.model.presets import PixelDecoderConfig, Vocabulary
from mug.model.text_decoder import Cache, CaptionHead, TextDecoder


class Decoder(Protocol):
    """What writes captions: a TextDecoder, or what is called like one."""

    @property
    def position_embed(self) -> Tensor: ...

    @property
    def blocks(self) -> Iterable[nn.Module]: ...

    @property
    def head(self) -> CaptionHead: ...

    def __call__(self, tokens_BT: Tensor, memory_BLD: Tensor, /, *, caches: list[Cache] | None = None) -> Tensor: ...


def _next_logits(
    decoder: Decoder, vocabulary: Vocabulary, token_B: Tensor, memory_BLD: Tensor, caches: list[Cache]
) -> Tensor:
    """Returns fp32 [B, V]: the logits of what follows `token_B`, given the caches."""
    hidden_BTD = decoder(token_B[:, None], memory_BLD, caches=caches)
    logits_BV = decoder.head(hidden_BTD[:, -1]).float()
    never = [vocabulary.pad, vocabulary.bos]
    return logits_BV.index_fill(1, torch.tensor(never, device=logits_BV.device), -torch.inf)


def write(decoder: Decoder, vocabulary: Vocabulary, memory_BLD: Tensor, beams: int) -> Tensor:
    """Returns captions: int64 [B, T], BOS … EOS PAD; one beam is greedy."""
    if beams == 1:
        return greedy(decoder, vocabulary, memory_BLD)
    return beam_search(decoder, vocabulary, memory_BLD, beams)


@torch.inference_mode()
def greedy(decoder: Decoder, vocabulary: Vocabulary, memory_BLD: Tensor) -> Tensor:
    """Returns captions by greedy decoding: int64 [B, T], BOS … EOS PAD.

    Args:
        memory_BLD: [B, L, encoder width], the encoder's output.
    """
    length = len(decoder.position_embed)
    tokens_BT = torch.full((len(memory_BLD), length), vocabulary.pad, device=memory_BLD.device)
    tokens_BT[:, 0] = vocabulary.bos
    caches: list[Cache] = [{} for _ in decoder.blocks]
    done_B = torch.zeros(len(memory_BLD), dtype=torch.bool, device=memory_BLD.device)
    for t in range(1, length):
        best_B = _next_logits(decoder, vocabulary, tokens_BT[:, t - 1], memory_BLD, caches).argmax(1)
        tokens_BT[:, t] = best_B.masked_fill(done_B, vocabulary.pad)
        done_B |= best_B == vocabulary.eos
        if done_B.all():
            break
    return tokens_BT


@torch.inference_mode()
def beam_search(decoder: Decoder, vocabulary: Vocabulary, memory_BLD: Tensor, beams: int) -> Tensor:
    """Returns captions of the highest mean log-probability a token, by beam search: int64 [B, T], BOS … EOS PAD.

    Args:
        memory_BLD: [B, L, encoder width], the encoder's output.
        beams: K, hypotheses kept for each image.
    """
    length = len(decoder.position_embed)
    B, K, V = len(memory_BLD), beams, vocabulary.size
    device = memory_BLD.device
    memory = memory_BLD.repeat_interleave(K, dim=0)  # [B·K, L, D]
    tokens = torch.full((B, K, length), vocabulary.pad, device=device)
    tokens[..., 0] = vocabulary.bos
    score_BK = torch.full((B, K), -torch.inf, device=device)
    score_BK[:, 0] = 0.0  # all beams start alike: only the first one counts
    done_BK = torch.zeros(B, K, dtype=torch.bool, device=device)
    caches: list[Cache] = [{} for _ in decoder.blocks]
    only_pad_V = torch.full((V,), -torch.inf, device=device).index_fill(
        0, torch.tensor(vocabulary.pad, device=device), 0.0
    )
    for t in range(1, length):
        logits = _next_logits(decoder, vocabulary, tokens[..., t - 1].flatten(), memory, caches)
        step_BKV = logits.log_softmax(1).view(B, K, V)
        step_BKV = torch.where(done_BK[..., None], only_pad_V, step_BKV)  # a finished one stays as it is
        score_BK, choice_BK = (score_BK[..., None] + step_BKV).flatten(1).topk(K)
        parent_BK, token_BK = choice_BK // V, choice_BK % V
        tokens = tokens.gather(1, parent_BK[..., None].expand(-1, -1, length))
        tokens[..., t] = token_BK
        done_BK = done_BK.gather(1, parent_BK) | (token_BK == vocabulary.eos)
        row = (parent_BK + K * torch.arange(B, device=device)[:, None]).flatten()  # [B·K]
        for cache in caches:
            grown = [name for name in cache if name != "memory_kv"]  # the image's are alike for all beams
            cache.update({name: cache[name][row] for name in grown})
        if done_BK.all():
            break
    written_BK = (tokens != vocabulary.pad).sum(-1) - 1
    best_B = (score_BK / written_BK).argmax(1)
    return tokens[torch.arange(B, device=device), best_B]


@torch.inference_mode()
def word_attention(decoder: TextDecoder, tokens_BT: Tensor, memory_BLD: Tensor) -> Tensor:
    """Returns fp32 [B, T, L], where in the image the decoder looks to write each token: the cross-attention of its last
    layer, mean over heads. The rows sum to 1; that of the first token, which is given, is 0.

    Args:
        tokens_BT: int64 [B, T], BOS … EOS PAD.
        memory_BLD: [B, L, encoder width], the encoder's output.
    """
    block: Any = decoder.blocks[-1]
    seen: list[Tensor] = []
    handle = block.cross_attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    decoder(tokens_BT, memory_BLD)
    handle.remove()
    layer = block.cross_attn
    q_BTHd = layer.q(block.norm_cross(seen[0])).unflatten(-1, (layer.heads, -1)).float()
    k_BLHd = layer.kv(memory_BLD).unflatten(-1, (2, layer.heads, -1))[:, :, 0].float()
    logits_BHTL = torch.einsum("bthd,blhd->bhtl", q_BTHd, k_BLHd) * q_BTHd.shape[-1] ** -0.5
    weights_BTL = logits_BHTL.softmax(-1).mean(1)
    # The state at a token writes the next one.
    return torch.nn.functional.pad(weights_BTL[:, :-1], (0, 0, 1, 0))


def paint(
    config: PixelDecoderConfig, image_BCHW: Tensor, masked_BM: Tensor, prediction_BMP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns uint8 (masked, reconstruction), each [B, 3, H, W]; the visible patches are the image's own.

    A model of normalised patches predicts a patch up to its mean and contrast: these are the true ones (as in
    MAE's own pictures), so the picture shows the predicted structure, not the predicted brightness.

    Args:
        image_BCHW: uint8 [B, 3, H, W].
        masked_BM: int64 [B, M], the patches to reconstruct.
        prediction_BMP: the pixel decoder's output for them; None leaves them grey.
    """
    patches_BNP = patchify(image_BCHW, config.patch_size)
    index = masked_BM[..., None].expand(-1, -1, config.patch_values)
    grey = _unpatchify(patches_BNP.scatter(1, index, 128), config.patch_size)
    if prediction_BMP is None:
        return grey, grey
    prediction_BMP = prediction_BMP.float()
    if config.normalize_patches:
        true_BMP = gather_patches(image_BCHW, masked_BM, config.patch_size)
        mean, std = patch_statistics(normalize_channels(true_BMP, PIXEL_MEAN, PIXEL_STD))
        prediction_BMP = prediction_BMP * std + mean
    scale, shift = (torch.tensor(c, device=image_BCHW.device) for c in (PIXEL_STD, PIXEL_MEAN))
    pixels = prediction_BMP.unflatten(-1, (-1, 3)) * scale + shift
    painted_BMP = (pixels.flatten(-2) * 255).round().clamp(0, 255).to(torch.uint8)
    return grey, _unpatchify(patches_BNP.scatter(1, index, painted_BMP), config.patch_size)


def _unpatchify(patches_BNP: Tensor, patch_size: int) -> Tensor:
    """Returns [B, 3, H, W] of patches [B, N, P]; undoes `patchify`."""
    B, N, _ = patches_BNP.shape
    side = round(N**0.5)
    x = patches_BNP.view(B, side, side, patch_size, patch_size, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, 3, side * patch_size, side * patch_size)
