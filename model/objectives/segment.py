"""Semantic segmentation: UperNet (arXiv 1807.10221) on a plain ViT, as MAE's ViT is evaluated on ADE20K.

Dimension letters: B batch, D width, C classes, g patches along a side, L tokens.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mug.model import flops
from mug.model.batch_norm import convert_batch_norms
from mug.model.encoder import Encoder
from mug.model.keyed_random import DROP_CHANNEL, random_bits
from mug.model.objectives.objective import Batch, Context, Losses, Metrics, Objective
from mug.model.presets import TunedEncoderConfig, at_least
from mug.model.stochastic_depth import prepare_for_finetuning, sample_drop_path
from mug.model.vit import Block, init_weights

IGNORED = 255  # the label of pixels that do not count
SCALES = 4
DROPOUT = 0.1  # of entire channels, before each classifier
POOLED = (1, 2, 3, 6)  # UperNet's pyramid pooling
AUXILIARY_TAP, AUXILIARY_CHANNELS = 2, 256


class FeaturePyramid(nn.Module):
    """Maps of a quarter, an eighth, … of the image (for 16 px patches) from four maps [B, D, g, g] of the ViT's one
    scale: enlarged 4 and 2 times, left, and halved."""

    def __init__(self, width: int):
        super().__init__()

        def double() -> nn.Module:
            return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)

        self.scales = nn.ModuleList(
            [
                nn.Sequential(double(), nn.BatchNorm2d(width), nn.GELU(), double()),
                double(),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [scale(x) for scale, x in zip(self.scales, maps, strict=True)]


class ChannelDropout(nn.Module):
    """Drops entire channels in training: those not in `keep_BD`, bool [B, D], which is set before each pass."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.keep_BD: Tensor | None = None

    def forward(self, x_BDHW: Tensor) -> Tensor:
        if not self.training:
            return x_BDHW
        assert self.keep_BD is not None
        return x_BDHW * (self.keep_BD.to(x_BDHW.dtype) / (1 - DROPOUT))[..., None, None]


@dataclass(frozen=True)
class SegmentConfig(TunedEncoderConfig):
    """Sizes of an encoder and UperNet on it.

    Args:
        image_size: side of the square that the model sees, in pixels.
        channels: UperNet's.
    """

    image_size: int = 512
    channels: int = 768

    def check(self) -> None:
        super().check()
        at_least(self, 1, "channels")
        at_least(self, SCALES, "depth")  # UperNet takes maps after so many blocks


class Segment(Objective):
    """Reads uint8 `image` [B, 3, S, S], int64 `labels` [B, S, S] (255 does not count) and int64 `position` [B].

    `segments` is UperNet's loss, `auxiliary` that of a convolutional head on the third of the four maps; the maps are
    the blocks' outputs after 1/4, 1/2, 3/4 and all of them. The heads are transformers', and dropout before their
    classifiers mmsegmentation's. The encoder's last norm is left out.
    """

    Config = SegmentConfig
    losses: ClassVar = {"segments": 1.0, "auxiliary": 0.4}
    kinds = ("scenes",)
    zero3_leaves = (Block,)
    couples_in_forward = True  # by batch norms

    def __init__(self, config: SegmentConfig, context: Context):
        super().__init__(config, context)
        self.classes, self.seed = len(context.class_names), context.seed
        self.encoder = Encoder(config, config.norm_eps).apply(init_weights)
        self.drops = prepare_for_finetuning(self.encoder, config.drop_path)
        self.encoder.norm = nn.Identity()
        self.taps = [config.depth * (i + 1) // SCALES for i in range(SCALES)]  # blocks that have run by then
        self.pyramid = FeaturePyramid(config.width)
        self.head, self.auxiliary = _heads(config.width, self.classes, config.channels)
        self.dropouts = [module for module in self.modules() if isinstance(module, ChannelDropout)]
        self.head_flops = _flops((self.pyramid, self.head, self.auxiliary), config)
        convert_batch_norms(self)

    def forward(self, batch: Batch) -> tuple[Losses, Metrics]:
        """Returns cross-entropies over the pixels that count; the share of them that is right."""
        if self.training:
            sample_drop_path(self.drops, self.seed, batch["position"])
            self._choose_channels(batch["position"])
        labels_BSS, maps = batch["labels"], self.maps(batch["image"])
        logits_BCSS = self._enlarged(self.head(maps))
        auxiliary_BCSS = self._enlarged(self.auxiliary(maps))
        counted_BSS = labels_BSS != IGNORED
        right = ((logits_BCSS.argmax(1) == labels_BSS) & counted_BSS).sum() / counted_BSS.sum().clamp(min=1)
        losses = {
            "segments": _cross_entropy(logits_BCSS, labels_BSS),
            "auxiliary": _cross_entropy(auxiliary_BCSS, labels_BSS),
        }
        return losses, {"accuracy/segments": right}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of pixels that count."""
        return dict.fromkeys(self.active, int((batch["labels"] != IGNORED).sum()))

    def flops(self, batch: Batch) -> float:
        """Returns the encoder's FLOP, and those of UperNet's convolutions as PyTorch counts them."""
        return len(batch["position"]) * (flops.encoder(self.config) + self.head_flops)

    def logits(self, image_BCHW: Tensor) -> Tensor:
        """Returns logits, fp32 [B, C, S, S], of uint8 images [B, 3, S, S]."""
        return self._enlarged(self.head(self.maps(image_BCHW)))

    def maps(self, image_BCHW: Tensor) -> list[Tensor]:
        """Returns [B, D, 4g, 4g], [B, D, 2g, 2g], [B, D, g, g], [B, D, g/2, g/2]."""
        grid = self.config.grid
        tapped = self.encoder(image_BCHW, taps=self.taps)  # [B, 1 + N, D] each
        return self.pyramid([x_BLD[:, 1:].transpose(1, 2).unflatten(2, (grid, grid)) for x_BLD in tapped])

    def _choose_channels(self, position_B: Tensor) -> None:
        widths = [dropout.channels for dropout in self.dropouts]
        draws_BK = random_bits(self.seed, DROP_CHANNEL, position_B, sum(widths)).double() / 2.0**63
        for dropout, draws_BD in zip(self.dropouts, draws_BK.split(widths, dim=1), strict=True):
            dropout.keep_BD = draws_BD >= DROPOUT

    def _enlarged(self, logits_BCgg: Tensor) -> Tensor:
        size = self.config.image_size
        return nn.functional.interpolate(logits_BCgg.float(), size=(size, size), mode="bilinear")


def _cross_entropy(logits_BCSS: Tensor, labels_BSS: Tensor) -> Tensor:
    total = nn.functional.cross_entropy(logits_BCSS, labels_BSS, ignore_index=IGNORED, reduction="sum")
    return total / (labels_BSS != IGNORED).sum().clamp(min=1)  # 0, not NaN, where nothing counts


def _flops(modules: tuple[nn.Module, ...], config: SegmentConfig) -> float:
    """Returns the FLOP of an image, forward and backward, in pyramid and heads, as PyTorch counts convolutions."""
    pyramid, *heads = copy.deepcopy(nn.ModuleList(modules)).to("meta").eval()
    maps = [torch.empty(1, config.width, config.grid, config.grid, device="meta")] * SCALES
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        scaled = pyramid(maps)
        for head in heads:
            head(scaled)
    return 3.0 * counter.get_total_flops()


def _heads(width: int, classes: int, channels: int) -> tuple[nn.Module, nn.Module]:
    """Returns transformers' UperNet head and its auxiliary one, freshly drawn."""
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    sizes: dict[str, Any] = {"hidden_size": channels, "num_labels": classes, "pool_scales": list(POOLED)}
    auxiliary = {"auxiliary_channels": AUXILIARY_CHANNELS, "auxiliary_num_convs": 1, "auxiliary_concat_input": False}
    config = UperNetConfig(**sizes, **auxiliary)
    in_channels = [width] * SCALES
    heads: tuple[Any, Any] = (
        UperNetHead(config, in_channels),
        UperNetFCNHead(config, in_channels, in_index=AUXILIARY_TAP),
    )
    for head in heads:
        nn.init.normal_(head.classifier.weight, std=0.01)
        nn.init.zeros_(head.classifier.bias)
        head.classifier = nn.Sequential(ChannelDropout(head.classifier.in_channels), head.classifier)
    return heads
