"""Write captions with the text decoder, and paint the masked patches.

Dimension letters: B batch, T tokens, L encoded image tokens, V vocabulary, K beams.
"""

import torch
from torch import Tensor

from mug.kernels.masked_patch_loss import gather_patches, normalize_channels, patch_statistics, patchify
from mug.model.encoder import PIXEL_MEAN, PIXEL_STD
from mug.model.mug import MUG
from mug.model.text_decoder import Cache


def _next_logits(model: MUG, token_B: Tensor, memory_BLD: Tensor, caches: list[Cache]) -> Tensor:
    """fp32 [B, V]: what follows `token_B`, given what the caches hold."""
    hidden_B1D = model.text_decoder(token_B[:, None], memory_BLD, caches=caches)
    logits_BV = model.text_decoder.head(hidden_B1D)[:, 0].float()
    never = [model.vocabulary.pad, model.vocabulary.bos]
    return logits_BV.index_fill(1, torch.tensor(never, device=logits_BV.device), -torch.inf)


@torch.inference_mode()
def greedy(model: MUG, memory_BLD: Tensor) -> Tensor:
    """The likeliest next token, again and again: int64 [B, T], BOS … EOS PAD.

    Args:
        memory_BLD: [B, L, encoder width], the encoder's output.
    """
    vocabulary, length = model.vocabulary, model.config.text_length
    tokens_BT = torch.full((len(memory_BLD), length), vocabulary.pad, device=memory_BLD.device)
    tokens_BT[:, 0] = vocabulary.bos
    caches: list[Cache] = [{} for _ in model.text_decoder.blocks]
    done_B = torch.zeros(len(memory_BLD), dtype=torch.bool, device=memory_BLD.device)
    for t in range(1, length):
        best_B = _next_logits(model, tokens_BT[:, t - 1], memory_BLD, caches).argmax(1)
        tokens_BT[:, t] = best_B.masked_fill(done_B, vocabulary.pad)
        done_B |= best_B == vocabulary.eos
        if done_B.all():
            break
    return tokens_BT


@torch.inference_mode()
def beam_search(model: MUG, memory_BLD: Tensor, beams: int) -> Tensor:
    """Captions of the highest mean log-probability a token, by beam search: int64 [B, T], BOS … EOS PAD.

    Args:
        memory_BLD: [B, L, encoder width], the encoder's output.
        beams: K, hypotheses kept for each image.
    """
    vocabulary, length = model.vocabulary, model.config.text_length
    B, K, V = len(memory_BLD), beams, vocabulary.size
    device = memory_BLD.device
    memory = memory_BLD.repeat_interleave(K, dim=0)  # [B·K, L, D]
    tokens = torch.full((B, K, length), vocabulary.pad, device=device)
    tokens[..., 0] = vocabulary.bos
    score_BK = torch.full((B, K), -torch.inf, device=device)
    score_BK[:, 0] = 0.0  # all beams start alike: only the first one counts
    done_BK = torch.zeros(B, K, dtype=torch.bool, device=device)
    caches: list[Cache] = [{} for _ in model.text_decoder.blocks]
    only_pad_V = torch.full((V,), -torch.inf, device=device).index_fill(
        0, torch.tensor(vocabulary.pad, device=device), 0.0
    )
    for t in range(1, length):
        logits = _next_logits(model, tokens[..., t - 1].flatten(), memory, caches)
        step_BKV = logits.log_softmax(1).view(B, K, V)
        step_BKV = torch.where(done_BK[..., None], only_pad_V, step_BKV)  # a finished one stays as it is
        score_BK, choice_BK = (score_BK[..., None] + step_BKV).flatten(1).topk(K)
        parent_BK, token_BK = choice_BK // V, choice_BK % V
        tokens = tokens.gather(1, parent_BK[..., None].expand(-1, -1, length))
        tokens[..., t] = token_BK
        done_BK = done_BK.gather(1, parent_BK) | (token_BK == vocabulary.eos)
        row = (parent_BK + K * torch.arange(B, device=device)[:, None]).flatten()  # [B·K]
        for cache in caches:
            cache.update({name: cache[name][row] for name in ("k", "v")})  # the image's are alike for all beams
        if done_BK.all():
            break
    written_BK = (tokens != vocabulary.pad).sum(-1) - 1
    best_B = (score_BK / written_BK).argmax(1)
    return tokens[torch.arange(B, device=device), best_B]


@torch.inference_mode()
def reconstruct(model: MUG, image_BCHW: Tensor, position_B: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (masked, reconstruction), each [B, 3, H, W]; the visible patches are the image's own.

    A model of normalised patches predicts a patch up to its mean and contrast: these are the true ones (as in
    MAE's own figures), so the picture shows the predicted structure, not the predicted brightness.

    Args:
        image_BCHW: uint8 [B, 3, H, W].
        position_B: int64 [B], decides the mask.
    """
    config = model.config
    visible_BK, masked_BM = model.forward_mask(position_B)
    encoded_BLD = model.encoder(image_BCHW, visible_BK)
    prediction_BMP = model.pixel_decoder(encoded_BLD, visible_BK, masked_BM).float()
    if config.normalize_patches:
        true_BMP = gather_patches(image_BCHW, masked_BM, config.patch_size)
        mean, std = patch_statistics(normalize_channels(true_BMP, PIXEL_MEAN, PIXEL_STD))
        prediction_BMP = prediction_BMP * std + mean
    scale, shift = (torch.tensor(c, device=image_BCHW.device) for c in (PIXEL_STD, PIXEL_MEAN))
    pixels = prediction_BMP.unflatten(-1, (-1, 3)) * scale + shift
    painted_BMP = (pixels.flatten(-2) * 255).round().clamp(0, 255).to(torch.uint8)
    patches_BNP = patchify(image_BCHW, config.patch_size)
    index = masked_BM[..., None].expand(-1, -1, config.patch_values)
    grey = patches_BNP.scatter(1, index, 128)
    return tuple(_unpatchify(x, config.patch_size) for x in (grey, patches_BNP.scatter(1, index, painted_BMP)))


def _unpatchify(patches_BNP: Tensor, patch_size: int) -> Tensor:
    """[B, N, P] back to [B, 3, H, W]; undoes `patchify`."""
    B, N, _ = patches_BNP.shape
    side = round(N**0.5)
    x = patches_BNP.view(B, side, side, patch_size, patch_size, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, 3, side * patch_size, side * patch_size)
