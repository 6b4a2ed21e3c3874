"""Teachers' weights (model/momentum.py): fp32 averages of the optimizer's fp32 weights, cut into the same slices."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mug.model.momentum import student_names
from mug.run.state.sharded_state import OwnedSlice, ParamSlice, optimizer_slices


class Average(NamedTuple):
    """A slice of a student's parameter, and the slice of the teacher's parameter that follows it."""

    student: OwnedSlice
    teacher: OwnedSlice  # its `master` is the average, fp32


Averages = dict[str, list[Average]]  # by the teacher's parameter, the same names on all ranks


def build_averages(engine: Any, weights: dict[str, Tensor]) -> Averages:
    """Returns this rank's slices of the averages, as they were before the engine was built.

    Args:
        weights: of the model, fp32, by parameter.
    """
    averages: Averages = {teacher: [] for teacher in student_names(engine.module)}
    held = {one.piece.name: one for one in optimizer_slices(engine)}  # a rank has one slice of a parameter
    for teacher, student in student_names(engine.module).items():
        if one := held.get(student):
            values = weights[teacher].flatten()[one.piece.start : one.piece.start + one.numel]
            average = values.to(one.master.device, torch.float32, copy=True)
            piece = ParamSlice(teacher, one.piece.start)
            averages[teacher].append(Average(one, OwnedSlice(piece, one.numel, average, 0)))
    return averages


@torch.no_grad()
def update_teachers(engine: Any, progress: float) -> None:
    """Let teachers follow their students: average ← m · average + (1 - m) · weight, m = `momentum_at(progress)`.

    A collective call, after each `engine.step()` that ends an optimizer step. It does nothing for an objective without
    teachers, nor after a step that was skipped.

    Args:
        progress: share of the training that is done, 0 to 1.
    """
    if not engine.averages or not engine.was_step_applied():
        return
    pairs = [average for slices in engine.averages.values() for average in slices]
    if pairs:
        students, teachers = zip(*((pair.student.weight, pair.teacher.weight) for pair in pairs), strict=True)
        torch._foreach_lerp_(teachers, students, 1 - engine.module.momentum_at(progress))
    _fill_teachers(engine)


def _fill_teachers(engine: Any) -> None:
    """Give the parameters that the teachers compute with the averages' values, in their own precision."""
    stage, parameters = engine.zero_optimization_stage(), dict(engine.module.named_parameters())
    for name, slices in engine.averages.items():
        held, first = _computed_with(engine, parameters[name])
        if stage in (1, 2):  # every rank computes with all of it, and has a part of the average, or none
            held.zero_()
        for _, teacher in slices:
            held.narrow(0, teacher.piece.start - first, teacher.numel).copy_(teacher.weight)
        if stage in (1, 2):
            dist.all_reduce(held)
    if stage == 3:
        _gather_again([parameters[name] for name in engine.averages])


def _computed_with(engine: Any, parameter: nn.Parameter) -> tuple[Tensor, int]:
    """Returns this rank's part of a parameter, flattened, and where in the parameter it begins."""
    if engine.zero_optimization_stage() == 3:
        # Not through GatheredParameters: without a modifier_rank it drops what is written, with one it broadcasts all.
        return parameter.ds_tensor, engine.global_rank * parameter.partition_numel()
    return parameter.data.view(-1), 0


def _gather_again(parameters: list[nn.Parameter]) -> None:
    """Small parameters stay gathered between steps (stage3_param_persistence_threshold): renew what is gathered."""
    gathered = [parameter for parameter in parameters if parameter.ds_status.name == "AVAILABLE"]
    if gathered:
        gathered[0].partition(gathered)
        gathered[0].all_gather(gathered)
