"""Semantic segmentation: UperNet (arXiv 1807.10221) on a plain ViT, as MAE's ViT is evaluated on ADE20K.

Dimension letters: B batch, D width, C classes, g patches along a side, L tokens.
"""

from torch import Tensor, nn

from mug.model.classifier import choose_paths, take_over
from mug.model.encoder import Encoder
from mug.model.presets import ModelConfig, ModelConfigError
from mug.model.random_choices import DROP_CHANNEL, random_bits

Batch = dict[str, Tensor]

IGNORED = 255  # the label of pixels that do not count
SCALES = 4
DROPOUT = 0.1  # of whole channels, before each classifier
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
    """Leaves whole channels out in training: those not in `keep_BD`, bool [B, D], which is set before each pass."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.keep_BD: Tensor | None = None

    def forward(self, x_BDHW: Tensor) -> Tensor:
        return x_BDHW * (self.keep_BD.to(x_BDHW.dtype) / (1 - DROPOUT))[..., None, None] if self.training else x_BDHW


class Segmenter(nn.Module):
    """The objective of segmentation: `losses, report = model(batch)`.

    `batch` holds uint8 `image` [B, 3, S, S], int64 `labels` [B, S, S] (255 does not count) and int64 `position` [B].
    `segments` is UperNet's loss, `auxiliary` that of a convolutional head on the third of the four maps; the maps are
    the blocks' outputs after 1/4, 1/2, 3/4 and all of them. The heads are transformers', and dropout before their
    classifiers mmsegmentation's. The encoder is taken over, its last norm left out.

    Args:
        config: the encoder's sizes, resolved, for images of S pixels.
        channels: UperNet's.
        drop_path: rate of the last block; it rises linearly from 0 at the first.
        seed: fixes, with a sample's position, which branches and channels are left out.

    Raises:
        ModelConfigError: fewer than four blocks.
    """

    terms = ("segments", "auxiliary")

    def __init__(
        self,
        encoder: Encoder,
        config: ModelConfig,
        classes: int,
        channels: int,
        drop_path: float,
        seed: int,
    ):
        super().__init__()
        if config.depth < SCALES:
            raise ModelConfigError(f"model.depth {config.depth} is too small: UperNet takes maps after {SCALES} blocks")
        self.config, self.classes, self.seed = config, classes, seed
        self.encoder = encoder
        self.drops = take_over(encoder, drop_path)
        encoder.norm = nn.Identity()
        self.taps = [config.depth * (i + 1) // SCALES for i in range(SCALES)]  # blocks that have run by then
        self.pyramid = FeaturePyramid(config.width)
        self.head, self.auxiliary = _heads(config.width, classes, channels)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(losses, report): cross-entropies over the pixels that count, fp32; the share of them that is right."""
        if self.training:
            choose_paths(self.drops, self.seed, batch["position"])
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
        """How many terms each loss is a mean over: pixels that count."""
        return dict.fromkeys(self.terms, int((batch["labels"] != IGNORED).sum()))

    def logits(self, image_BCHW: Tensor) -> Tensor:
        """fp32 [B, C, S, S], of uint8 images [B, 3, S, S]."""
        return self._enlarged(self.head(self.maps(image_BCHW)))

    def maps(self, image_BCHW: Tensor) -> list[Tensor]:
        """[B, D, 4g, 4g], [B, D, 2g, 2g], [B, D, g, g], [B, D, g/2, g/2]."""
        x_BLD, tapped = self.encoder.embed(image_BCHW), []
        for done, block in enumerate(self.encoder.blocks, start=1):
            x_BLD = block(x_BLD)
            if done in self.taps:
                tapped.append(x_BLD[:, 1:].transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid)))
        return self.pyramid(tapped)

    def _choose_channels(self, position_B: Tensor) -> None:
        dropouts = [self.head.classifier[0], self.auxiliary.classifier[0]]
        widths = [dropout.channels for dropout in dropouts]
        draws_BK = random_bits(self.seed, DROP_CHANNEL, position_B, sum(widths)).double() / 2.0**63
        for dropout, draws_BD in zip(dropouts, draws_BK.split(widths, dim=1), strict=True):
            dropout.keep_BD = draws_BD >= DROPOUT

    def _enlarged(self, logits_BCgg: Tensor) -> Tensor:
        size = self.config.image_size
        return nn.functional.interpolate(logits_BCgg.float(), size=(size, size), mode="bilinear")


def _cross_entropy(logits_BCSS: Tensor, labels_BSS: Tensor) -> Tensor:
    total = nn.functional.cross_entropy(logits_BCSS, labels_BSS, ignore_index=IGNORED, reduction="sum")
    return total / (labels_BSS != IGNORED).sum().clamp(min=1)  # 0, not NaN, where nothing counts


def _heads(width: int, classes: int, channels: int) -> tuple[nn.Module, nn.Module]:
    """transformers' UperNet head and its auxiliary one, freshly drawn."""
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    sizes = {"hidden_size": channels, "num_labels": classes, "pool_scales": list(POOLED)}
    auxiliary = {"auxiliary_channels": AUXILIARY_CHANNELS, "auxiliary_num_convs": 1, "auxiliary_concat_input": False}
    config = UperNetConfig(**sizes, **auxiliary)
    in_channels = [width] * SCALES
    heads = UperNetHead(config, in_channels), UperNetFCNHead(config, in_channels, in_index=AUXILIARY_TAP)
    for head in heads:
        nn.init.normal_(head.classifier.weight, std=0.01)
        nn.init.zeros_(head.classifier.bias)
        head.classifier = nn.Sequential(ChannelDropout(head.classifier.in_channels), head.classifier)
    return heads
