"""Teachers: modules whose weights are an exponential moving average of a student's (MoCo v3, arXiv 2104.02057).

An objective that has them builds each with `teacher_of`, names them, as in `teachers = {"teacher": "encoder"}`, and
sets how slowly they follow in `momentum_at`. Its `forward` calls a teacher under `torch.no_grad()`. The average itself
is kept in fp32, sharded like the optimizer's weights (run/state/averages.py): in bf16 a teacher would not follow at a
momentum near 1.
"""

import copy
import math
from typing import TypeVar

from torch import nn

from mug.model.objectives.objective import Objective

Module = TypeVar("Module", bound=nn.Module)


def teacher_of(student: Module) -> Module:
    """Returns a copy of the module, with the same weights, that takes no gradient."""
    return copy.deepcopy(student).requires_grad_(False)


def cosine_momentum(base: float, progress: float) -> float:
    """Returns the momentum at `progress` (0 to 1) of training: from `base` to 1 along half a cosine (MoCo v3, BYOL)."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * progress)) / 2


def student_names(model: Objective) -> dict[str, str]:
    """Returns teacher's parameter → student's, by name, where that is trained; {} for a model without teachers.

    Raises:
        ValueError: a teacher's parameter takes a gradient, or its student has none of that name and shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    canonical = {parameter: name for name, parameter in model.named_parameters()}  # of a matrix under two names
    pairs = {}
    for teacher, student in model.teachers.items():
        for name, parameter in model.get_submodule(teacher).named_parameters(prefix=teacher):
            source = parameters.get(student + name.removeprefix(teacher))
            if parameter.requires_grad:
                raise ValueError(f"{name} takes a gradient: create the teacher by momentum.teacher_of")
            if source is None or _numel(source) != _numel(parameter):
                raise ValueError(f"{name} has no counterpart in {student}: create the teacher by momentum.teacher_of")
            if source.requires_grad:
                pairs[name] = canonical[source]
    return pairs


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor in its place
