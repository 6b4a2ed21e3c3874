"""Evaluates the segmentation of full images: mean IoU, by torchmetrics.

Dimension letters: C classes, S side of what the model sees, H, W height and width of an image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mug.data.kinds.scenes import WholeScenes
from mug.data.loader import load
from mug.data.order import spread
from mug.model.objectives.objective import Objective, name_of
from mug.model.objectives.segment import IGNORED, Segment
from mug.run.cluster import hardware
from mug.run.common.errors import RunError
from mug.run.common.packages import load_package
from mug.run.evaluators.evaluator import EvalConfig, EvalContext, Evaluator, Result, Subject
from mug.run.evaluators.sharing import share

STRIDE = 2 / 3  # of the side, from one window to the next, as mmsegmentation slides


@dataclass(frozen=True)
class SegmentationConfig(EvalConfig):
    """Mean IoU on full validation images, `trainer.eval_samples` of them, spread over the set."""


class Segmentation(Evaluator):
    """`mean IoU/segments` over the classes that occur, `accuracy/segments`, the share of correct pixels, and
    `mean IoU/commonest class`, that of predicting the commonest class everywhere. The ranks share the images."""

    Config = SegmentationConfig

    def __init__(self, config: SegmentationConfig, context: EvalContext):
        super().__init__(config, context)
        load_package("torchmetrics", "eval")

    def check(self, objective: Objective) -> None:
        if not isinstance(objective, Segment):
            raise RunError(
                f"evaluation segmentation needs objective {name_of(Segment)}, not {name_of(type(objective))}"
            )

    def run(self, subject: Subject) -> Result:
        (scenes,) = self.context.held_out.values()
        numbers = spread(len(scenes), self.context.max_samples)
        metrics = score(subject.whole, scenes, [numbers[i] for i in share(len(numbers))], self.context)
        about = {"method": "segmentation", "encoder": self.encoder_name(subject), "data": "validation images"}
        return Result(metrics, [about | {"images": len(numbers)} | metrics])


@torch.inference_mode()
def score(model: Segment, scenes: WholeScenes, mine: Sequence[int], context: EvalContext) -> dict[str, float]:
    """Returns the metrics over the images of all ranks, `mine` being this one's; a collective call."""
    from torchmetrics.classification import MulticlassConfusionMatrix

    matrix = MulticlassConfusionMatrix(model.classes, ignore_index=IGNORED).to(hardware.device())
    for batch, _ in load(scenes, [[number] for number in mine], context.workers):
        context.progress("segmentation of held-out images")
        batch = hardware.to_device(batch)
        logits_CHW = slide(model, batch["image"])
        size = tuple(batch["labels"].shape)
        whole_CHW = nn.functional.interpolate(logits_CHW[None], size=size, mode="bilinear")[0]
        matrix.update(whole_CHW.argmax(0)[None], batch["labels"][None])
    dist.all_reduce(matrix.confmat)
    return metrics_of(matrix.confmat.double())


def metrics_of(matrix_CC: Tensor) -> dict[str, float]:
    """Returns the metrics of a confusion matrix: rows are the true classes."""
    true_C, said_C, right_C = matrix_CC.sum(1), matrix_CC.sum(0), matrix_CC.diag()
    union_C = true_C + said_C - right_C
    iou = (right_C / union_C.clamp(min=1))[union_C > 0]
    commonest = true_C.max() / true_C.sum() / (true_C > 0).sum()
    return {
        "mean IoU/segments": iou.mean().item(),
        "accuracy/segments": (right_C.sum() / true_C.sum()).item(),
        "mean IoU/commonest class": commonest.item(),
    }


def slide(model: Segment, image_13HW: Tensor) -> Tensor:
    """Returns fp32 [C, H, W]: the mean logits of overlapping windows of S x S. H and W are at least S."""
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
    """Returns where windows begin, the last one at the end."""
    stride = max(1, int(STRIDE * size))
    yield from range(0, length - size, stride)
    yield length - size
