"""Sine-cosine positions by formula, and interpolate_pos_embed; that no checkpoint holds them."""

import math

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from mug.model.positions import interpolate_pos_embed, sincos_2d


@pytest.mark.parametrize("width, grid", [(8, 3), (12, 5)])
def test_each_entry_follows_the_formula(width, grid):
    table = sincos_2d(width, grid)
    quarter = width // 4
    assert table.shape == (grid**2, width) and table.dtype == torch.float32
    for row in range(grid):
        for column in range(grid):
            angles = [[place / 10000 ** (i / quarter) for i in range(quarter)] for place in (column, row)]
            expected = [f(angle) for axis in angles for f in (math.sin, math.cos) for angle in axis]
            torch.testing.assert_close(table[row * grid + column], torch.tensor(expected), atol=1e-7, rtol=0)


def test_tables_are_buffers_that_the_state_dict_leaves_out(make_model):
    model = make_model()
    tables = {name: table for name, table in model.named_buffers() if "positions" in name}
    assert set(tables) == {"encoder.positions_ND", "pixel_decoder.positions_ND"}
    assert not [name for name in model.state_dict() if "positions" in name]
    assert not [name for name, _ in model.named_parameters() if "positions" in name]
    for table in tables.values():
        assert torch.equal(table, sincos_2d(32, 4))


def test_positions_are_stretched_as_timm_stretches_them():
    table = sincos_2d(16, 14)
    ours = interpolate_pos_embed(table, 32)
    theirs = resample_abs_pos_embed(table[None], [32, 32], [14, 14], num_prefix_tokens=0, antialias=False)[0]
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(interpolate_pos_embed(table, 14), table)
    assert not torch.allclose(ours, sincos_2d(16, 32), atol=0.5)
