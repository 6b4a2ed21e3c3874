"""Batch norm over ranks: torch's on the entire batch in one process is the oracle."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import run_gloo_ranks
from torch import nn

from mug.model.batch_norm import (
    BatchNorm,
    batch_norm_state,
    convert_batch_norms,
    load_batch_norm_state,
    statistics_kept,
)

B, C = 12, 5
SHAPES = [(B, C), (B, C, 3, 2)]


def inputs(shape, offset: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch, whose rows differ in scale, and the weights of a loss."""
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(2, *shape, generator=generator)
    return x * torch.arange(1, B + 1).view(-1, *[1] * (len(shape) - 1)) + offset, weights


def learned(norm: nn.Module) -> nn.Module:
    """With a weight and a bias that are not 1 and 0."""
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, C))
        norm.bias.copy_(torch.linspace(-1, 1, C))
    return norm


def run(norm: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients of input, weight and bias, after two batches."""
    norm(x.flip(0))
    x = x.clone().requires_grad_()
    y = norm(x)
    (y.sin() * weights).sum().backward()
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def expected(shape, offset: float = 3.0) -> list[torch.Tensor]:
    return run(learned((nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(C)), *inputs(shape, offset))


def assert_is_the_oracle(cases) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for shape, cuts, true in cases:
        x, weights = inputs(shape)
        mine = slice(cuts[rank], cuts[rank + 1])
        norm = learned(BatchNorm(C))
        norm(x.flip(0)[mine])
        own = x[mine].clone().requires_grad_()
        y = norm(own)
        (y.sin() * weights[mine]).sum().backward()
        dist.all_reduce(norm.weight.grad)
        dist.all_reduce(norm.bias.grad)
        found = [y.detach(), own.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
        torch.testing.assert_close(found, [true[0][mine], true[1][mine], *true[2:]], rtol=1e-5, atol=1e-5)
        statistics = [torch.zeros(2, C) for _ in range(world)]
        dist.all_gather(statistics, torch.stack([norm.running_mean, norm.running_var]))
        assert all(torch.equal(statistics[0], other) for other in statistics)  # to the bit


@pytest.mark.parametrize("world", [2, 4])
def test_over_ranks_it_is_torchs_on_the_entire_batch(world):
    """Also with ranks that hold unlike numbers of rows."""
    even, uneven = list(range(0, B + 1, B // world)), [0, *range(1, world), B]
    run_gloo_ranks(
        world, assert_is_the_oracle, [(shape, cuts, expected(shape)) for shape in SHAPES for cuts in (even, uneven)]
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_process_group_it_is_torchs(shape):
    torch.testing.assert_close(run(learned(BatchNorm(C)), *inputs(shape)), expected(shape), rtol=1e-5, atol=1e-5)


def test_a_mean_far_above_the_deviation_costs_no_digits():
    x, _ = inputs((B, C), offset=1e5)
    true = nn.BatchNorm1d(C).double()(x.double())
    assert (BatchNorm(C)(x) - true).abs().max() < 1e-2  # of squares in fp32, nothing is left


def test_in_evaluation_the_running_statistics_are_used():
    x, weights = inputs((B, C))
    norms = learned(BatchNorm(C)), learned(nn.BatchNorm1d(C))
    for norm in norms:
        run(norm, x, weights)
        norm.eval()
    torch.testing.assert_close(norms[0](x), norms[1](x))


def test_bf16_is_normalised_in_fp32_and_leaves_the_statistics_alone():
    norm = learned(BatchNorm(C)).bfloat16()
    x, weights = (t.bfloat16() for t in inputs((B, C)))
    y, gradient, *_, mean, var = run(norm, x, weights)
    assert y.dtype == gradient.dtype == norm.weight.dtype == torch.bfloat16
    assert mean.dtype == var.dtype == torch.float32 and not norm.state_dict().keys() - {"weight", "bias"}
    reference = learned(nn.BatchNorm1d(C))
    true = run(reference, x.float(), weights.float())
    torch.testing.assert_close([mean, var], true[-2:])
    torch.testing.assert_close(y.float(), true[0], rtol=0.02, atol=0.02)


def test_one_value_a_channel_is_refused():
    with pytest.raises(ValueError, match=r"2 values a channel; \[1, 5\] holds 1"):
        BatchNorm(C)(torch.ones(1, C))


def test_statistics_go_through_the_extra_state():
    model = nn.Sequential(nn.Linear(C, C, bias=False), BatchNorm(C), nn.Sequential(BatchNorm(C, affine=False)))
    fresh = copy.deepcopy(model)
    x, _ = inputs((B, C))
    with statistics_kept(model):
        model(x)
    torch.testing.assert_close(batch_norm_state(model), batch_norm_state(fresh))
    model(x)
    state = batch_norm_state(model)
    assert sorted(state) == [f"{name}.running_{kind}" for name in ("1", "2.0") for kind in ("mean", "var")]
    load_batch_norm_state(fresh, state)
    model(x)  # what was handed over stays as it was
    assert all(torch.equal(batch_norm_state(fresh)[name], tensor) for name, tensor in state.items())
    assert torch.equal(model.eval()(x), model(x)) and not torch.equal(model(x), fresh.eval()(x))


def test_a_batch_that_is_not_finite_leaves_the_statistics():
    norm = BatchNorm(C)
    norm(inputs((B, C))[0])
    before = batch_norm_state(nn.Sequential(norm))
    x = inputs((B, C))[0]
    x[0, 1] = torch.inf
    norm(x)
    after = batch_norm_state(nn.Sequential(norm))
    for name, tensor in before.items():
        assert torch.equal(after[name][1], tensor[1]) and not torch.equal(after[name][0], tensor[0])


def test_torchs_batch_norms_are_converted_with_what_they_hold():
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.Sequential(learned(nn.BatchNorm2d(C)), nn.ReLU()))
    x, _ = inputs(SHAPES[1])
    model(x)
    converted = convert_batch_norms(copy.deepcopy(model))
    assert isinstance(converted[1][0], BatchNorm) and [n for n, _ in converted.named_parameters()] == [
        n for n, _ in model.named_parameters()
    ]
    torch.testing.assert_close(converted(x), model(x))
    torch.testing.assert_close(converted.eval()(x), model.eval()(x))
