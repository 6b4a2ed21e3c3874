"""An encoder with a linear layer on top, trained end to end on labelled images.

Dimension letters: B batch, N patches, D width, C classes.
"""

from torch import Tensor, nn

from mug.model.encoder import Encoder
from mug.model.presets import ModelConfig
from mug.model.random_choices import DROP_PATH, random_bits
from mug.model.vit import Block, LayerNorm

Batch = dict[str, Tensor]


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): leaves a residual branch out for the samples not in `keep_B`.

    `keep_B`, bool [B], is set before each forward pass in training.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.keep_B: Tensor | None = None

    def forward(self, x_BND: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x_BND
        return x_BND * (self.keep_B.to(x_BND.dtype) / (1 - self.rate))[:, None, None]


def take_over(encoder: Encoder, drop_path: float) -> list[DropPath]:
    """Make a pre-trained encoder ready to be trained end to end: its positions become a parameter, and its blocks get
    stochastic depth, of a rate that rises linearly from 0 to `drop_path`; returns these modules."""
    encoder.positions_ND = nn.Parameter(encoder._buffers.pop("positions_ND").clone())
    drops = []
    for i, block in enumerate(encoder.blocks):
        rate = drop_path * i / max(len(encoder.blocks) - 1, 1)
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        drops += [block.drop_path1, block.drop_path2]
    return drops


def choose_paths(drops: list[DropPath], seed: int, position_B: Tensor) -> None:
    """Decide by (seed, position) which branches the next forward pass leaves out."""
    draws_BK = random_bits(seed, DROP_PATH, position_B, len(drops)).double() / 2.0**63
    for drop, draw_B in zip(drops, draws_BK.unbind(1), strict=True):
        drop.keep_B = draw_B >= drop.rate


class Classifier(nn.Module):
    """The objective of fine-tuning, after MAE (arXiv 2111.06377, appendix A.1): `losses, report = model(batch)`.

    `batch` holds uint8 `image` [B, 3, H, W], fp32 `target` [B, C] (each row sums to 1) and int64 `position` [B].
    The encoder is taken over: its positions become a parameter; pooled by mean, its norm moves behind the pooling.

    Args:
        config: the encoder's sizes, resolved.
        pool: mean of the patch tokens, or cls, the class token.
        drop_path: rate of the last block; it rises linearly from 0 at the first.
        seed: fixes, with a sample's position, which branches are left out.
    """

    terms = ("class",)

    def __init__(self, encoder: Encoder, config: ModelConfig, classes: int, pool: str, drop_path: float, seed: int):
        super().__init__()
        self.config, self.pool, self.seed = config, pool, seed
        self.encoder = encoder
        self.drops = take_over(encoder, drop_path)
        self.norm = nn.Identity()
        if pool == "mean":
            encoder.norm, self.norm = nn.Identity(), LayerNorm(config.width)
        self.head = nn.Linear(config.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    @property
    def zero3_leaves(self) -> list[type[nn.Module]]:
        """Modules that ZeRO-3 gathers as a whole: one exchange a block instead of one a layer."""
        return [Block]

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many terms the loss is a mean over: images."""
        return {"class": len(batch["position"])}

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(losses, report): cross-entropy, fp32; top-1 and top-5 accuracy on the class with the most weight."""
        if self.training:
            choose_paths(self.drops, self.seed, batch["position"])
        logits_BC, target_BC = self.logits(batch["image"]).float(), batch["target"]
        loss = -(target_BC * logits_BC.log_softmax(1)).sum(1).mean()
        true_B = target_BC.argmax(1)
        best_B5 = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
        hit_B5 = best_B5 == true_B[:, None]
        report = {"accuracy/class": hit_B5[:, 0].float().mean(), "accuracy5/class": hit_B5.any(1).float().mean()}
        return {"class": loss}, report

    def logits(self, image_BCHW: Tensor) -> Tensor:
        """[B, C], of uint8 images [B, 3, H, W]."""
        tokens_BLD = self.encoder(image_BCHW)  # [B, 1 + N, D]
        pooled_BD = tokens_BLD[:, 1:].mean(1) if self.pool == "mean" else tokens_BLD[:, 0]
        return self.head(self.norm(pooled_BD))


def layer_of(name: str, depth: int) -> int:
    """The layer that a parameter of a Classifier counts to: 0 what comes before the blocks, depth + 1 what follows."""
    if name.startswith(("encoder.cls_token", "encoder.positions_ND", "encoder.patch_embed.")):
        return 0
    return 1 + int(name.split(".")[2]) if name.startswith("encoder.blocks.") else depth + 1
