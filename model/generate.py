"""Write captions with the text decoder, and reconstruct the masked patches.

Dimension letters: B batch, T tokens, L encoded image tokens, V vocabulary, K beams, C continuations.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mug.kernels.masked_patch_loss import gather_patches, normalize_channels, patch_statistics, patchify
from mug.model.encoder import PIXEL_MEAN, PIXEL_STD
from mug.model.presets import PixelDecoderConfig, Vocabulary
from mug.model.text_decoder import MEMORY_LENGTHS, Cache, CaptionHead, TextDecoder


class Decoder(Protocol):
    """What writes captions: a TextDecoder, or what is called like one."""

    @property
    def position_embed(self) -> Tensor: ...

    @property
    def blocks(self) -> Iterable[nn.Module]: ...

    @property
    def head(self) -> CaptionHead: ...

    def __call__(self, tokens_BT: Tensor, memory_BLD: Tensor, /, *, caches: list[Cache] | None = None) -> Tensor: ...


class Writer:
    """Predicts the next tokens of texts, and keeps what the layers need of the earlier ones.

    Args:
        memory_BLD: [B, L, encoder width], what is written about.
        first: the tokens that each text begins with; () for BOS.
        lengths_B: int64, of each sample's memory, padding after it; None where there is none.
    """

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        memory_BLD: Tensor,
        first: Sequence[int] = (),
        lengths_B: Tensor | None = None,
    ):
        self.decoder, self.vocabulary, self.memory_BLD = decoder, vocabulary, memory_BLD
        self.first = tuple(first) or (vocabulary.bos,)
        self.length = len(decoder.position_embed)
        kept = {} if lengths_B is None else {MEMORY_LENGTHS: lengths_B}
        self.caches: list[Cache] = [dict(kept) for _ in decoder.blocks]

    def empty(self, *sizes: int) -> Tensor:
        """Returns int64 [*sizes, T] of PAD after the first token."""
        tokens = torch.full((*sizes, self.length), self.vocabulary.pad, device=self.memory_BLD.device)
        tokens[..., 0] = self.first[0]
        return tokens

    def logits(self, tokens_BT: Tensor, t: int) -> Tensor:
        """Returns fp32 [B, V] of token `t`; to be called for 1, 2, … in turn. PAD and the first token never follow."""
        hidden_B1D = self.decoder(tokens_BT[:, t - 1 : t], self.memory_BLD, caches=self.caches)
        logits_BV = self.decoder.head(hidden_B1D[:, -1]).float()
        if t < len(self.first):
            return torch.full_like(logits_BV, -torch.inf).index_fill(1, self._ids(self.first[t]), 0.0)
        return logits_BV.index_fill(1, self._ids(self.vocabulary.pad, self.first[0]), -torch.inf)

    def reorder(self, row_B: Tensor) -> None:
        """Continue the texts of these rows; what is written about stays, as it is alike for all texts of a sample."""
        for cache in self.caches:
            cache.update({name: kept[row_B] for name, kept in cache.items() if not name.startswith("memory")})

    def _ids(self, *ids: int) -> Tensor:
        return torch.tensor(ids, device=self.memory_BLD.device)


@torch.inference_mode()
def write(
    decoder: Decoder,
    vocabulary: Vocabulary,
    memory_BLD: Tensor,
    beams: int = 1,
    first: Sequence[int] = (),
    lengths_B: Tensor | None = None,
) -> Tensor:
    """Returns captions, int64 [B, T], BOS … EOS PAD: by greedy decoding, or by beam search those of the highest mean
    log-probability a token.

    Args:
        beams: K, hypotheses for each image; one is greedy. The rest as of `Writer`.
    """
    if beams == 1:
        return greedy(Writer(decoder, vocabulary, memory_BLD, first, lengths_B))
    per_beam = None if lengths_B is None else lengths_B.repeat_interleave(beams)
    return beam_search(Writer(decoder, vocabulary, memory_BLD.repeat_interleave(beams, dim=0), first, per_beam), beams)


def greedy(writer: Writer) -> Tensor:
    """Returns captions of the tokens that are likeliest one by one."""
    B, vocabulary = len(writer.memory_BLD), writer.vocabulary
    tokens_BT = writer.empty(B)
    done_B = torch.zeros(B, dtype=torch.bool, device=tokens_BT.device)
    for t in range(1, writer.length):
        best_B = writer.logits(tokens_BT, t).argmax(1)
        tokens_BT[:, t] = best_B.masked_fill(done_B, vocabulary.pad)
        done_B |= best_B == vocabulary.eos
        if done_B.all():
            break
    return tokens_BT


def beam_search(writer: Writer, K: int) -> Tensor:
    """Returns captions of a writer whose memory holds each image K times.

    K hypotheses run. Of their continuations, one among the K best that ends is put aside, and the best K of these are
    kept; a sample is done once its best running hypothesis has a lower mean than the K-th put aside. So is the search
    of transformers' `generate` by its defaults (with `renormalize_logits`, and PAD and the first token suppressed).
    """
    B, V, device = len(writer.memory_BLD) // K, writer.vocabulary.size, writer.memory_BLD.device
    running_BKT, aside_BKT = writer.empty(B, K), writer.empty(B, K)
    mean_BK = torch.full((B, K), -torch.inf, device=device)  # of those put aside
    score_BK = mean_BK.clone()
    score_BK[:, 0] = 0.0  # all beams start alike: only the first one counts
    open_B1 = torch.ones_like(score_BK[:, :1], dtype=torch.bool)
    best_C = torch.arange(2 * K, device=device) < K
    for t in range(1, writer.length):
        step_BKV = writer.logits(running_BKT.flatten(0, 1), t).log_softmax(1).view(B, K, V)
        score_BC, choice_BC = (score_BK[..., None] + step_BKV).flatten(1).topk(2 * K)
        longer_BCT = _rows(running_BKT, choice_BC // V)
        longer_BCT[..., t] = choice_BC % V
        ends_BC = (longer_BCT[..., t] == writer.vocabulary.eos) | (t == writer.length - 1)
        ended_BC = (score_BC / t).masked_fill(~(ends_BC & best_C & open_B1), -torch.inf)
        mean_BK, kept_BK = torch.cat([mean_BK, ended_BC], dim=1).topk(K)
        aside_BKT = _rows(torch.cat([aside_BKT, longer_BCT], dim=1), kept_BK)
        score_BK, kept_BK = score_BC.masked_fill(ends_BC, -torch.inf).topk(K)
        running_BKT = _rows(longer_BCT, kept_BK)
        open_B1 &= score_BK[:, :1] / t > mean_BK[:, -1:]
        if not open_B1.any():
            break
        first_row_B1 = K * torch.arange(B, device=device)[:, None]
        writer.reorder(((choice_BC // V).gather(1, kept_BK) + first_row_B1).flatten())
    return aside_BKT[:, 0]


def _rows(tokens_BNT: Tensor, index_BK: Tensor) -> Tensor:
    """Returns [B, K, T], the hypotheses of these numbers."""
    return tokens_BNT.gather(1, index_BK[..., None].expand(-1, -1, tokens_BNT.shape[2]))


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
