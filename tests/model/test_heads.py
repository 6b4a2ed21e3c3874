"""Projection heads against the same layers of torch's."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_gloo_ranks
from torch import nn
from torch.nn.functional import normalize

from mug.model.heads import ProjectorConfig, projector, spread
from mug.model.presets import ModelConfigError, resolve


@pytest.mark.parametrize("last_norm", [True, False])
def test_a_projector_is_linear_layers_with_batch_norms_between(last_norm):
    head = projector((6, 8, 8, 4), last_norm)
    linears = [module for module in head if isinstance(module, nn.Linear)]
    assert [(one.in_features, one.out_features) for one in linears] == [(6, 8), (8, 8), (8, 4)]
    assert [one.bias is not None for one in linears] == [False, False, not last_norm]
    x = true = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    for linear in linears[:2]:
        true = nn.BatchNorm1d(8)(linear(true)).relu()
    true = linears[2](true)
    if last_norm:
        true = nn.BatchNorm1d(4, affine=False)(true)
    torch.testing.assert_close(head(x), true)
    assert len([*head.parameters()]) == 3 + 2 * 2 + (not last_norm)  # the last batch norm has none


def outputs(rows: int) -> torch.Tensor:
    """Unit vectors [rows, 6] that vary in three directions unequally."""
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([3, 2, 1, 0.1, 0.1, 0.1])
    return normalize(x + 0.5)


ROWS = pytest.mark.parametrize("rows", [4, 64], ids="{} outputs of size 6".format)


def expected_spread(x: torch.Tensor) -> dict[str, float]:
    x = x.double()
    eigenvalues = torch.linalg.eigvalsh(x.T.cov(correction=0))
    std = x.std(0, correction=0).mean() * 6**0.5
    return {"std": std.item(), "rank": (eigenvalues.sum() ** 2 / eigenvalues.square().sum()).item()}


def assert_spread_is_of_all_ranks(rows: int, expected: dict[str, float]) -> None:
    mine = outputs(rows).chunk(dist.get_world_size())[dist.get_rank()]
    assert {name: value.item() for name, value in spread(mine).items()} == pytest.approx(expected, rel=1e-4)


@ROWS
def test_spread_is_that_of_the_eigenvalues_at_any_number_of_ranks(rows):
    expected = expected_spread(outputs(rows))
    assert {name: value.item() for name, value in spread(outputs(rows)).items()} == pytest.approx(expected, rel=1e-4)
    run_gloo_ranks(2, assert_spread_is_of_all_ranks, rows, expected)


def test_spread_of_uniform_directions_and_of_collapsed_ones():
    uniform = spread(normalize(torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0))))
    assert uniform["std"].item() == pytest.approx(1, abs=0.01) and uniform["rank"].item() == pytest.approx(16, abs=0.1)
    line = normalize(torch.randn(500, 1)) * normalize(torch.ones(1, 16))
    assert spread(line)["rank"].item() == pytest.approx(1, abs=1e-3)
    assert spread(normalize(torch.ones(500, 16)))["std"] < 1e-3


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.2), (0.1, 1.5)])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ModelConfigError, match=r"model\.view_scale must be a min and a max"):
        resolve(ProjectorConfig(view_scale=scale))
