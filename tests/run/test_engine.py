"""What a model may hold so that a checkpoint holds all of it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mug.model.objectives.objective import Context, Objective
from mug.run.common.errors import RunError
from mug.run.training.engine import check_state
from mug.run.training.groups import parameter_groups
from mug.run.training.recipe import TrainerConfig


class Stack(Objective):
    def __init__(self, *layers: nn.Module):
        super().__init__(SimpleNamespace(depth=1), Context())
        self.layers = nn.Sequential(*layers)


def test_state_that_checkpoints_do_not_hold_is_refused():
    check_state(Stack(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)))
    model = Stack(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(RunError, match=r"do not save the buffer layers\.1\.running_mean \(3 in all\): .*extra_state"):
        check_state(model)
    model.extra_state = lambda: {f"layers.1.{name}": torch.zeros(2) for name in ("running_mean", "running_var")}
    with pytest.raises(RunError, match=r"do not save the buffer layers\.1\.num_batches_tracked \(1 in all\)"):
        check_state(model)


def test_what_is_frozen_is_in_no_group():
    model = Stack(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    decayed, others = (group["params"] for group in parameter_groups(model, TrainerConfig()))
    assert decayed == [model.layers[0].weight] and others == [model.layers[0].bias]
