"""How well whole images are segmented: mean IoU, by torchmetrics.

Dimension letters: C classes, S side of what the model sees, H, W height and width of an image.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mug.data.loader import load
from mug.model.segmenter import IGNORED, Segmenter
from mug.run.segmentation.images import WholeScenes
from mug.run.training import hardware

STRIDE = 2 / 3  # of the side, from one window to the next, as mmsegmentation slides


@torch.inference_mode()
def score(model: Segmenter, scenes: WholeScenes, samples: int, workers: int) -> dict[str, float]:
    """Of the first `samples` images, which the ranks share: mean IoU over the classes that occur, and the share of
    the pixels that are right; and the mean IoU of who says the commonest class everywhere. A collective call."""
    from torchmetrics.classification import MulticlassConfusionMatrix

    matrix = MulticlassConfusionMatrix(model.classes, ignore_index=IGNORED).to(hardware.device())
    mine = range(dist.get_rank(), min(samples, len(scenes.scenes)), dist.get_world_size())
    model.eval()
    for batch, _ in load(scenes, [[i] for i in mine], workers):
        batch = hardware.to_device(batch)
        logits_CHW = slide(model, batch["image"])
        size = tuple(batch["labels"].shape)
        whole_CHW = nn.functional.interpolate(logits_CHW[None], size=size, mode="bilinear")[0]
        matrix.update(whole_CHW.argmax(0)[None], batch["labels"][None])
    model.train()
    return figures_of(matrix.compute().double())


def figures_of(matrix_CC: Tensor) -> dict[str, float]:
    """The figures of a confusion matrix: rows are the true classes."""
    true_C, said_C, right_C = matrix_CC.sum(1), matrix_CC.sum(0), matrix_CC.diag()
    union_C = true_C + said_C - right_C
    iou = (right_C / union_C.clamp(min=1))[union_C > 0]
    commonest = true_C.max() / true_C.sum() / (true_C > 0).sum()
    return {
        "mean IoU/segments": iou.mean().item(),
        "accuracy/segments": (right_C.sum() / true_C.sum()).item(),
        "mean IoU/commonest class": commonest.item(),
    }


def slide(model: Segmenter, image_13HW: Tensor) -> Tensor:
    """fp32 [C, H, W]: the mean of the logits of overlapping windows of S x S. H and W are at least S."""
    size, (height, width) = model.config.image_size, image_13HW.shape[2:]
    total_CHW = torch.zeros(model.classes, height, width, device=image_13HW.device)
    seen_HW = torch.zeros(height, width, device=image_13HW.device)
    for top in places(height, size):
        for left in places(width, size):
            rows, columns = slice(top, top + size), slice(left, left + size)
            total_CHW[:, rows, columns] += model.logits(image_13HW[:, :, rows, columns].contiguous())[0]
            seen_HW[rows, columns] += 1
    return total_CHW / seen_HW


def places(length: int, size: int) -> Iterator[int]:
    """Where windows begin, the last one at the end."""
    stride = max(1, int(STRIDE * size))
    yield from range(0, length - size, stride)
    yield length - size
