"""The attentive probe: a query attends to frozen patch tokens, a linear layer classifies what it collects.

As V-JEPA and AIM judge frozen encoders whose class token or mean was never trained to hold the image (arXiv 2401.08541,
section 3). Features are computed once, of the central square. Dimension letters: N images, L patches, D width,
H heads, C classes.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mug.model.encoder import Encoder
from mug.run.cluster import hardware
from mug.run.common.command_line import check_min
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import EvalContext, Evaluator, Result, Subject
from mug.run.evaluators.features import EncoderFeatures, Features, extract_shared, untrained_encoder
from mug.run.evaluators.frozen import FrozenConfig, open_images, record_of
from mug.run.evaluators.results import Accuracies
from mug.run.evaluators.sharing import gather_numbered, share

MAX_BYTES = 8 * 2**30  # of the patch tokens of all images, in memory


@dataclass(frozen=True, kw_only=True)
class AttentiveProbeConfig(FrozenConfig):
    """A classifier that attends to frozen patch tokens.

    Args:
        epochs: passes over the training images.
        probe_batch: images of one update.
        learning_rate: AdamW's peak; then a cosine.
        heads: of the attention; it must divide the encoder's width.
    """

    epochs: int = 30
    probe_batch: int = 128
    learning_rate: float = 1e-3
    heads: int = 1

    def check(self) -> None:
        super().check()
        check_min(self, {"epochs": 1, "probe_batch": 2, "heads": 1})
        if self.encoder not in ("checkpoint", "random"):
            raise RunError(f"encoder {self.encoder} has no patch tokens; choose checkpoint or random")


class PatchTokens(EncoderFeatures):
    """The patch tokens of full images, flat."""

    def forward(self, image_B3SS: Tensor) -> Features:
        return {"patches": self.encoder(image_B3SS)[:, 1:].flatten(1)}


class AttentiveHead(nn.Module):
    """Attention of one learned query to the normalised tokens, then a linear layer."""

    def __init__(self, width: int, classes: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.query = nn.Parameter(torch.randn(heads, width // heads) * 0.02)
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens_NLD: Tensor) -> Tensor:
        """Returns logits [N, C]."""
        x_NLD = self.norm(tokens_NLD.flatten(0, 1)).view_as(tokens_NLD)
        key, value = (layer(x_NLD).unflatten(2, (self.heads, -1)) for layer in (self.key, self.value))
        weight_NLH = ((key * self.query).sum(-1) / math.sqrt(self.query.shape[1])).softmax(1)
        return self.head((weight_NLH[..., None] * value).sum(1).flatten(1))


class AttentiveProbe(Evaluator):
    """Top-1 accuracy on labelled images after the last epoch: `accuracy/attentive probe, patches`. The ranks share the
    encoding, and the probes by seed."""

    Config = AttentiveProbeConfig

    def __init__(self, config: AttentiveProbeConfig, context: EvalContext):
        super().__init__(config, context)
        self.images = open_images(config, context)

    def run(self, subject: Subject) -> Result:
        config = subject.module.config
        if config.width % self.config.heads:
            raise RunError(f"heads {self.config.heads} do not divide the encoder's width {config.width}")
        size = 4 * config.width * config.patches * (len(self.images.train) + len(self.images.test))
        if size > MAX_BYTES:
            raise RunError(f"the patch tokens would take {size / 2**30:.0f} GiB: lower max_train or max_test")
        random, found = self.config.encoder == "random", Accuracies(self.config.hits)
        shared = None if random else self._tokens(subject.whole.encoder, config)
        mine = []
        for seed in range(self.config.seeds):
            tokens = shared or self._tokens(untrained_encoder(subject.whole, seed), config)
            if seed in share(self.config.seeds):
                self.context.progress(f"attentive probe, seed {seed}")
                mine.append((seed, self._right(*tokens, seed)))
        for right_M in gather_numbered(mine):
            found.add("patches", "", right_M)
        return found.result("attentive probe", record_of(self.config, "attentive probe", self.encoder_name(subject)))

    def _tokens(self, encoder: Encoder, config: Any) -> tuple[Tensor, Tensor]:
        """Returns fp32 [N, L, D] of the training and the test images; a collective call."""
        network = PatchTokens(encoder, config.image_size)
        flat = [extract_shared(network, one, self.context)["patches"] for one in (self.images.train, self.images.test)]
        train_NLD, test_MLD = (one.unflatten(1, (config.patches, config.width)) for one in flat)
        return train_NLD, test_MLD

    def _right(self, train_NLD: Tensor, test_MLD: Tensor, seed: int) -> Tensor:
        """Train and test one probe; returns which test images were right, bool [M]."""
        images = self.images
        head = train_head(train_NLD, images.train_labels_N, images.classes, self.config, seed)
        with torch.inference_mode():
            parts = [head(part.to(hardware.device())).argmax(1).cpu() for part in test_MLD.split(512)]
        return torch.cat(parts) == images.test_labels_M


def train_head(
    tokens_NLD: Tensor, labels_N: Tensor, classes: int, config: AttentiveProbeConfig, seed: int
) -> AttentiveHead:
    """Returns the trained probe, in eval mode; `seed` decides its initial weights and the order of the images."""
    device, generator = hardware.device(), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = AttentiveHead(tokens_NLD.shape[2], classes, config.heads).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate)
    batches = max(1, len(labels_N) // config.probe_batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * batches)
    for _ in range(config.epochs):
        for chosen in torch.randperm(len(labels_N), generator=generator).tensor_split(batches):
            logits = head(tokens_NLD[chosen].to(device))
            loss = nn.functional.cross_entropy(logits, labels_N[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.eval()
