"""Writes the results of evaluations into a run's folder."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mug.run.cluster import hardware
from mug.run.common.output import write_whole
from mug.run.evaluators.evaluator import Result
from mug.run.evaluators.intervals import Accuracy
from mug.run.reporting.grid import draw_grid
from mug.run.reporting.records import CAPTIONS, TRANSLATIONS


def save_examples(result: Result, output: Path, step: int) -> None:
    """Write pictures to samples/step-N.png, captions and translations to .jsonl of these names, in the run's folder; a
    collective call."""
    texts = {CAPTIONS: result.captions, TRANSLATIONS: result.translations}

    def write() -> None:
        if result.pictures:
            draw_grid(result.pictures, output / "samples" / f"step-{step}.png")
        for file, rows in texts.items():
            if rows:
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                write_whole(output / file, "".join(lines))

    if result.pictures or any(texts.values()):
        hardware.on_rank_zero(write)


class Accuracies:
    """Accuracies by feature and setting, one for each seed, on the same test images.

    hits: keep which images were right in the records, too.
    """

    def __init__(self, hits: bool = False):
        self.hits = hits
        self.right: dict[tuple[str, str], list[Tensor]] = {}

    def add(self, feature: str, setting: str, right_M: Tensor) -> None:
        """Add which test images the next seed had right, bool or 0 and 1."""
        self.right.setdefault((feature, setting), []).append(right_M)

    def result(self, name: str, about: dict[str, Any]) -> Result:
        """Returns metrics named accuracy/NAME, with feature and setting, and a record each that begins with `about`."""
        metrics, records = {}, []
        for names, seeds in self.right.items():
            accuracy = Accuracy(tuple(right_M.double().mean().item() for right_M in seeds), len(seeds[0]))
            metrics[f"accuracy/{', '.join(filter(None, (name, *names)))}"] = accuracy.mean
            record = {**about, "feature": names[0], "setting": names[1], **accuracy.row()}
            records.append(record | ({"hits": [digits(right_M) for right_M in seeds]} if self.hits else {}))
        return Result(metrics, records)


def digits(right_M: Tensor) -> str:
    """Returns 1 for each image that was right, 0 for the others."""
    return bytes(right_M.to(torch.uint8) + ord("0")).decode()
