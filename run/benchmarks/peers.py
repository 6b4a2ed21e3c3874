"""What an objective's peers train: models of the same sizes from the packages that people use, and their losses.

A peer is a module that returns the loss of a batch. Images come as its own loader would hand them over: `pixels`, fp32
and normalised; views in the colours that our objective has, as fp32 in 0..1.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mug.model.augment import augment_views
from mug.model.encoder import PIXEL_MEAN, PIXEL_STD
from mug.model.objectives.objective import Batch
from mug.model.presets import Vocabulary
from mug.model.two_views import alike


def normalized(image: Tensor) -> Tensor:
    """Returns fp32 [..., 3, H, W], less ImageNet's mean and over its deviation, of floating images in 0..1."""
    mean, std = (torch.tensor(values, device=image.device)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return (image - mean) / std


class CLIPPeer(nn.Module):
    """open_clip's CLIP and its loss."""

    def __init__(self, config: Any, vocabulary: Vocabulary):
        super().__init__()
        open_clip = import_module("open_clip")
        text = _open_clip_text(config, vocabulary) | {"layers": config.text_layers}
        self.model = open_clip.CLIP(config.embedding_width, _open_clip_image(config), text)
        self.loss = open_clip.ClipLoss()

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(*self.model(batch["pixels"], batch["tokens"]))


class CoCaPeer(nn.Module):
    """open_clip's CoCa and its loss. One more query is the image's embedding, where ours pools once more; and each
    cross-attention has an MLP of its own, which ours lacks."""

    def __init__(self, config: Any, vocabulary: Vocabulary):
        super().__init__()
        open_clip = import_module("open_clip")
        pooling = {"attn_pooler_queries": 1 + config.image_queries, "attn_pooler_heads": config.text_heads}
        image = _open_clip_image(config) | pooling | {"attentional_pool": True, "output_tokens": True}
        text = _open_clip_text(config, vocabulary)
        unimodal = text | {"layers": config.text_unimodal_layers, "embed_cls": True, "output_tokens": True}
        multimodal = text | {"layers": config.text_cross_layers}
        self.model = open_clip.CoCa(config.embedding_width, multimodal, unimodal, image, pad_id=vocabulary.pad)
        self.loss = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=vocabulary.pad)

    def forward(self, batch: Batch) -> Tensor:
        contrastive, caption = self.loss(**self.model(batch["pixels"], batch["tokens"]))
        return contrastive + caption


def _open_clip_image(config: Any) -> dict[str, Any]:
    sizes = {"layers": config.depth, "width": config.width, "head_width": config.width // config.heads}
    return sizes | {"patch_size": config.patch_size, "image_size": config.image_size}


def _open_clip_text(config: Any, vocabulary: Vocabulary) -> dict[str, Any]:
    sizes = {"context_length": config.text_length, "width": config.text_width, "heads": config.text_heads}
    end = {"pool_type": "eos", "eos_id": vocabulary.eos, "pad_id": vocabulary.pad}
    return sizes | end | {"vocab_size": vocabulary.size}


class MAEPeer(nn.Module):
    """transformers' ViTMAE."""

    def __init__(self, config: Any, vocabulary: Vocabulary):
        super().__init__()
        transformers = import_module("transformers")
        encoder = {"hidden_size": config.width, "intermediate_size": 4 * config.width}
        encoder |= {"num_hidden_layers": config.depth, "num_attention_heads": config.heads}
        decoder = {"hidden_size": config.pixel_width, "intermediate_size": 4 * config.pixel_width}
        decoder |= {"num_hidden_layers": config.pixel_depth, "num_attention_heads": config.pixel_heads}
        image = {"image_size": config.image_size, "patch_size": config.patch_size, "mask_ratio": config.mask_ratio}
        sizes = encoder | {f"decoder_{name}": value for name, value in decoder.items()} | image
        self.model = transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(**sizes, norm_pix_loss=config.normalize_patches)
        )

    def forward(self, batch: Batch) -> Tensor:
        return self.model(batch["pixels"]).loss


class TwoViewsPeer(nn.Module):
    """timm's ViT, whose class tokens of two views go to heads and a loss of lightly's."""

    def __init__(self, config: Any):
        super().__init__()
        self.views = alike(config.view_scale)
        sizes = {"img_size": config.image_size, "patch_size": config.patch_size, "embed_dim": config.width}
        self.encoder = VisionTransformer(**sizes, depth=config.depth, num_heads=config.heads, num_classes=0)

    def class_tokens(self, batch: Batch) -> Tensor:
        """Returns fp32 [2B, D]."""
        views = augment_views(batch["views"], self.views, seed=0, position_B=batch["position"])
        return self.encoder(normalized(torch.cat(views)))


class SimCLRPeer(TwoViewsPeer):
    def __init__(self, config: Any, vocabulary: Vocabulary):
        super().__init__(config)
        hidden, out = config.projector_width, config.projection_width
        layers = [(before, hidden, nn.BatchNorm1d(hidden), nn.ReLU()) for before in (config.width, hidden)]
        self.head = import_module("lightly.models.modules.heads").ProjectionHead([*layers, (hidden, out, None, None)])
        self.loss = import_module("lightly.loss").NTXentLoss(config.temperature)

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(*self.head(self.class_tokens(batch)).chunk(2))


class SimSiamPeer(TwoViewsPeer):
    def __init__(self, config: Any, vocabulary: Vocabulary):
        super().__init__(config)
        heads = import_module("lightly.models.modules.heads")
        projection = config.projection_width
        self.projector = heads.SimSiamProjectionHead(config.width, config.projector_width, projection)
        self.predictor = heads.SimSiamPredictionHead(projection, config.predictor_width, projection)
        self.loss = import_module("lightly.loss").NegativeCosineSimilarity()

    def forward(self, batch: Batch) -> Tensor:
        first, second = (self.projector(x) for x in self.class_tokens(batch).chunk(2))
        forth, back = self.predictor(first), self.predictor(second)
        return (self.loss(forth, second.detach()) + self.loss(back, first.detach())) / 2


class Peer(NamedTuple):
    """The package whose code it is, what builds it, and fields of Config that it ties to others."""

    package: str
    build: Callable[[Any, Vocabulary], nn.Module]
    alike: tuple[tuple[str, str], ...] = ()


PEERS = {
    "clip": Peer("open_clip", CLIPPeer),
    "coca": Peer("open_clip", CoCaPeer, (("embedding_width", "text_width"),)),
    "mae": Peer("transformers", MAEPeer),
    "simclr": Peer("lightly", SimCLRPeer),
    "simsiam": Peer("lightly", SimSiamPeer),
}
