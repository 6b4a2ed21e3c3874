"""The switches for NVIDIA's apex, with a stand-in that computes what PyTorch does."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Context
from mug.model.presets import Vocabulary, resolve
from mug.run.common.errors import RunError
from mug.run.state.sharded_state import adam_steps
from mug.run.training.apex import check_apex, fuse_layer_norms, fused_adam
from mug.run.training.groups import parameter_groups
from mug.run.training.recipe import TrainerConfig


class FusedLayerNorm(nn.LayerNorm):
    pass


class FusedAdam(torch.optim.AdamW):
    def __init__(self, groups, lr, betas, eps, adam_w_mode):
        assert adam_w_mode
        super().__init__(groups, lr=lr, betas=betas, eps=eps)


@pytest.fixture
def apex(monkeypatch):
    for name, attribute in (("apex.normalization", FusedLayerNorm), ("apex.optimizers", FusedAdam)):
        module = ModuleType(name)
        setattr(module, attribute.__name__, attribute)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))


CONTEXT = Context(vocabulary=Vocabulary(20, pad=0, bos=1, eos=2, mask=3))


@pytest.fixture
def model() -> MUG:
    torch.manual_seed(0)
    return MUG(resolve(MUGConfig("tiny", depth=1, pixel_depth=1)), CONTEXT)


BOTH = TrainerConfig(apex_adam=True, apex_layer_norm=True)


def test_every_layer_norm_is_replaced_and_keeps_its_weights_and_results(apex, model):
    batch = {
        "image": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8),
        "tokens": torch.tensor([[1, 7, 8, 2], [1, 9, 2, 0]]),
        "position": torch.arange(2),
    }
    names, before = list(model.state_dict()), model(batch)[0]
    weights = dict(model.named_parameters())
    count = sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    fuse_layer_norms(model)
    assert sum(type(module) is FusedLayerNorm for module in model.modules()) == count > 10
    assert not any(type(module) is nn.LayerNorm for module in model.modules())
    assert all(module.eps == 1e-6 for module in model.modules() if type(module) is FusedLayerNorm)
    assert list(model.state_dict()) == names
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    assert model(batch)[0] == before


def test_the_optimizer_has_the_recipes_numbers_and_groups(apex, model):
    optimizer = fused_adam(parameter_groups(model, BOTH), BOTH, 1e-8)
    assert type(optimizer) is FusedAdam
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (BOTH.learning_rate, (0.9, 0.95), 1e-8)


def test_what_is_not_asked_for_is_not_looked_for():
    check_apex(TrainerConfig(), {})


@pytest.mark.parametrize("switch, module", [("apex_adam", "optimizers"), ("apex_layer_norm", "normalization")])
def test_a_missing_apex_is_named_with_the_switch_that_asked(switch, module):
    with pytest.raises(RunError, match=rf"trainer.{switch}: apex.{module} cannot be imported .* docs/kernels.md"):
        check_apex(TrainerConfig(**{switch: True}), {})


def test_the_other_package_of_that_name_is_distinguished_from_nvidias(apex, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex.optimizers", ModuleType("apex.optimizers"))
    with pytest.raises(RunError, match=r"trainer.apex_adam: apex.optimizers has no FusedAdam"):
        check_apex(TrainerConfig(apex_adam=True), {})


def test_an_optimizer_in_host_memory_is_refused(apex):
    check_apex(BOTH, {"zero_optimization": {"stage": 3}})
    with pytest.raises(RunError, match="remove offload_optimizer"):
        check_apex(BOTH, {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})


@pytest.mark.parametrize("in_group", [False, True], ids=["torch", "apex"])
def test_steps_are_read_where_the_optimizer_counts_them(in_group):
    state = {"exp_avg": torch.zeros(1)} | ({} if in_group else {"step": torch.tensor(7.0)})
    group = {"lr": 0.1} | ({"step": 7} if in_group else {})
    optimizer = SimpleNamespace(param_groups=[group], state={torch.zeros(1): state})
    assert adam_steps(SimpleNamespace(basic_optimizer=optimizer)) == 7
