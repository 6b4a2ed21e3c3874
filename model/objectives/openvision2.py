"""OpenVision 2 (arXiv 2509.01644): the decoder writes the caption of a random part of the encoder's tokens.

Where the authors differ: their decoder has these tokens and the words in one causal sequence; here it cross-attends to
them, as CapPa's. Dimension letters: B batch, N patches, L = 1 + N, M tokens that the decoder sees, D width.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from mug.model.captioner import Captioner
from mug.model.keyed_random import KEPT, random_bits
from mug.model.presets import ModelConfigError, TextDecoderConfig


@dataclass(frozen=True)
class OpenVision2Config(TextDecoderConfig):
    """Sizes of an encoder and of a decoder that writes the caption.

    Args:
        text_unimodal_layers: text blocks that see only text.
        kept_tokens: share of the patches' tokens that the decoder sees in training, besides the class token.
    """

    text_unimodal_layers: int = 0
    kept_tokens: float = 0.35

    @property
    def kept(self) -> int:
        """Patches' tokens that the decoder sees."""
        return round(self.patches * self.kept_tokens)

    def check(self) -> None:
        super().check()
        if not 0 < self.kept_tokens <= 1 or not self.kept:
            raise ModelConfigError(f"model.kept_tokens {self.kept_tokens} keeps no patch, or more than there are")


class OpenVision2(Captioner):
    """A captioner whose position also decides, with the seed, which tokens the decoder sees; afterwards it sees all."""

    Config = OpenVision2Config

    @property
    def seen_tokens(self) -> int:
        return 1 + self.config.kept

    def seen(self, encoded_BLD: Tensor, position_B: Tensor) -> Tensor:
        draw_BN = random_bits(self.context.seed, KEPT, position_B, self.config.patches)
        kept_BK = draw_BN.argsort(dim=1, stable=True)[:, : self.config.kept]
        index_BM = pad(1 + kept_BK, (1, 0))  # the class token is number 0
        return encoded_BLD.gather(1, index_BM[..., None].expand(-1, -1, encoded_BLD.shape[-1]))
