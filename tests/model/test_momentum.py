"""Teachers: which parameter follows which, and how closely."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from mug.model.momentum import cosine_momentum, student_names, teacher_of
from mug.model.objectives.objective import Context, Objective


class Pair(Objective):
    teachers: ClassVar = {"teacher": "body"}

    def __init__(self):
        super().__init__(None, Context())
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        self.body[1].weight = self.body[0].weight  # one matrix under two names
        self.body[1].bias.requires_grad_(False)
        self.teacher = teacher_of(self.body)


def test_a_teacher_begins_as_its_student_and_takes_no_gradient():
    model = Pair()
    assert torch.equal(model.teacher[0].weight, model.body[0].weight)
    assert model.teacher[0].weight is not model.body[0].weight
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def test_each_parameter_follows_its_trained_counterpart():
    assert student_names(Pair()) == {"teacher.0.weight": "body.0.weight", "teacher.0.bias": "body.0.bias"}
    assert student_names(Objective(None, Context())) == {}


def test_a_teacher_that_is_no_copy_is_refused():
    model = Pair()
    model.teacher[0] = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"teacher\.0\.weight has no counterpart in body"):
        student_names(model)
    model.teacher[0] = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"teacher\.0\.weight takes a gradient"):
        student_names(model)


def test_momentum_rises_to_one_along_half_a_cosine():
    assert [round(cosine_momentum(0.9, progress), 6) for progress in (0, 0.5, 1)] == [0.9, 0.95, 1.0]
    assert cosine_momentum(0.99, 1 / 3) == pytest.approx(1 - 0.01 * 0.75)
