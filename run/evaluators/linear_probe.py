"""The linear probe of MAE (arXiv 2111.06377, appendix A.1) on frozen features.

BatchNorm without affine, then a linear layer, trained by LARS without weight decay: 90 epochs, ten of warm-up, then
a cosine. What differs from MAE:
  - Features are computed once, of the central square: the probe sees no random crops and no flips.
  - A set smaller than ImageNet is cut into smaller batches, so that an epoch still makes MAE's 78 updates. The
    learning rate stays at MAE's 6.4 (0.1 x 16,384 / 256): a LARS step is measured by the weights' norm, so a rate
    scaled down with the batch would end far from the optimum (docs/log.md).
Dimension letters: N images, D width, C classes.
"""

import math
from dataclasses import dataclass

import torch
from timm.optim import Lars
from torch import Tensor, nn

from mug.run.cluster import hardware
from mug.run.common.command_line import check_min
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import EvalContext, Evaluator, Result, Subject
from mug.run.evaluators.frozen import Extracted, FrozenConfig, encoders, open_images, record_of
from mug.run.evaluators.results import Accuracies
from mug.run.evaluators.sharing import gather_numbered, share

SMALLEST_BATCH, LARGEST_BATCH = 32, 16384
UPDATES = 78  # of an epoch of MAE's: 1.28 million images in batches of 16,384


@dataclass(frozen=True)
class ProbeConfig:
    """MAE's settings. `batch` None: 16,384, or less where the images would not make 78 updates an epoch."""

    epochs: int = 90
    warmup_epochs: int = 10
    batch: int | None = None
    learning_rate: float = 6.4

    def batch_for(self, images: int) -> int:
        return self.batch or min(max(math.ceil(images / UPDATES), SMALLEST_BATCH), LARGEST_BATCH)


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(FrozenConfig):
    """A linear classifier on frozen features.

    Args:
        epochs: passes over the training images.
        probe_batch: images of one update; without it 16,384, or N / 78 if less.
        learning_rate: LARS's peak.
    """

    seeds: int = 3
    epochs: int = ProbeConfig.epochs
    probe_batch: int | None = None
    learning_rate: float = ProbeConfig.learning_rate

    def check(self) -> None:
        super().check()
        check_min(self, {"epochs": 1, "probe_batch": 2})
        if not self.learning_rate > 0:
            raise RunError(f"learning_rate must be more than 0, not {self.learning_rate}")


class LinearProbe(Evaluator):
    """Top-1 accuracy of the last epoch on labelled images, by class token and by the mean of the patch tokens:
    `accuracy/linear probe, FEATURE`. The ranks share the encoding, and the probes by feature and seed."""

    Config = LinearProbeConfig

    def __init__(self, config: LinearProbeConfig, context: EvalContext):
        super().__init__(config, context)
        self.images = open_images(config, context)
        self.probe = ProbeConfig(epochs=config.epochs, batch=config.probe_batch, learning_rate=config.learning_rate)

    def run(self, subject: Subject) -> Result:
        found = Accuracies(self.config.hits)
        for encoder in encoders(self.config, self.context, self.images, subject):
            jobs = [(feature, seed) for feature in encoder.train for seed in encoder.seeds]
            mine = [(number, self._right(encoder, *jobs[number])) for number in share(len(jobs))]
            for (feature, _), right_M in zip(jobs, gather_numbered(mine), strict=True):
                found.add(feature, "", right_M)
        return found.result("linear probe", record_of(self.config, "linear probe", self.encoder_name(subject)))

    def _right(self, encoder: Extracted, feature: str, seed: int) -> Tensor:
        """Train and test one probe; returns which test images were right, bool [M]."""
        self.context.progress(f"linear probe on the {feature}, seed {seed}")
        device, images = hardware.device(), self.images
        train_ND, labels_N = encoder.train[feature].to(device), images.train_labels_N.to(device)
        probe = train_probe(train_ND, labels_N, images.classes, self.probe, seed)
        with torch.inference_mode():
            predicted_M = probe(encoder.test[feature].to(device)).argmax(1).cpu()
        return predicted_M == images.test_labels_M


def build_probe(width: int, classes: int) -> nn.Sequential:
    head = nn.Linear(width, classes)
    nn.init.trunc_normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), head)


def train_probe(features_ND: Tensor, labels_N: Tensor, classes: int, config: ProbeConfig, seed: int) -> nn.Module:
    """Returns the trained probe, in eval mode; `seed` decides its initial weights and the order of the images.

    Args:
        features_ND: fp32, on the device to train on.
        labels_N: int64, 0..C-1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        probe = build_probe(features_ND.shape[1], classes).to(features_ND.device)
    head = probe[1]
    # Trust ratios for the matrix only; without weight decay timm's Lars needs always_adapt.
    groups = [{"params": [head.weight], "always_adapt": True}, {"params": [head.bias]}]
    batch = config.batch_for(len(features_ND))
    optimizer = Lars(groups, lr=config.learning_rate, momentum=0.9)
    batches = min(math.ceil(len(features_ND) / batch), len(features_ND) // 2)  # BatchNorm wants two of each
    for step in range(config.epochs * batches):
        if step % batches == 0:
            order_N = torch.randperm(len(features_ND), generator=generator).to(features_ND.device)
        chosen = order_N[step % batches :: batches]  # so that no batch of an epoch is smaller by more than one
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step / batches, config)
        loss = nn.functional.cross_entropy(probe(features_ND[chosen]), labels_N[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return probe.eval()


def _schedule(epoch: float, config: ProbeConfig) -> float:
    """Returns the share of the peak learning rate after `epoch` epochs."""
    if epoch < config.warmup_epochs:
        return epoch / config.warmup_epochs
    done = (epoch - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * done))
