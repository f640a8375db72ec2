"""Reordering of each head's tokens: six codes, inverses, text that stays."""

from __future__ import annotations

import pytest
import torch

from patchkit.kernels import KernelValueError, reorder_heads
from patchkit.kernels.errors import GradientError
from patchkit.kernels.reorder import ORDERS, address_table, distinct_orders, rows_of_order
from patchkit.kernels.reorder.reference import reorder_reference

GRID = (3, 4, 5)


def tokens(heads=6, extra=7, dtype=torch.float32):
    return torch.randn(2, heads, 60 + extra, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("start", [0, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_codes_and_their_inverses_are_exact(start, dtype):
    x, codes = tokens(dtype=dtype), [3, 1, 2, 5, 4, 0]
    (moved,) = reorder_heads(x, codes=codes, grid=GRID, start=start)
    assert torch.equal(moved, reorder_reference(x, codes, GRID, start))
    (back,) = reorder_heads(moved, codes=codes, grid=GRID, start=start, inverse=True)
    assert torch.equal(back, x)
    assert torch.equal(reorder_reference(moved, codes, GRID, start, inverse=True), x)
    text = torch.ones(67, dtype=torch.bool)
    text[start : start + 60] = False
    assert torch.equal(moved[:, :, text], x[:, :, text])


def test_only_two_and_five_are_each_others_inverse():
    x = tokens(extra=0)
    for code in range(6):
        twice = x
        for _ in range(2):
            (twice,) = reorder_heads(twice, codes=[code] * 6, grid=GRID)
        assert torch.equal(twice, x) == (code in (0,))  # on a grid of unlike sides only the identity undoes itself
    rows = [rows_of_order(c, GRID) for c in range(6)]
    assert torch.equal(rows[2].view(4, 5, 3).permute(2, 0, 1).reshape(-1), torch.arange(60))
    assert torch.equal(rows[5].view(5, 3, 4).permute(1, 2, 0).reshape(-1), torch.arange(60))


def test_the_address_map_is_the_permutation():
    table = address_table(tuple(range(6)), GRID, torch.device("cpu"))
    n = torch.arange(60)
    for code, (n1, n2, s0, s1, s2) in enumerate(table.tolist()):
        place = (n // (n1 * n2)) * s0 + (n // n2 % n1) * s1 + (n % n2) * s2
        assert torch.equal(place, rows_of_order(code, GRID))


def test_several_tensors_and_heads_that_share_keys():
    q, k = tokens(heads=6), tokens(heads=2)
    moved = reorder_heads(q, k, codes=[0, 1, 2, 3, 4, 5], grid=GRID, start=7)
    assert [x.shape[1] for x in moved] == [6, 6]
    repeated = k.repeat_interleave(3, 1)
    assert torch.equal(moved[1], reorder_reference(repeated, [0, 1, 2, 3, 4, 5], GRID, 7))


def test_inputs_are_left_alone_and_views_are_fine():
    x = tokens().transpose(1, 2).contiguous().transpose(1, 2)
    kept = x.clone()
    (moved,) = reorder_heads(x, codes=[2] * 6, grid=GRID)
    assert torch.equal(x, kept)
    assert torch.equal(moved, reorder_reference(kept, [2] * 6, GRID))


def test_orders_of_an_image():
    assert distinct_orders((1, 8, 6)) == (0, 1)
    assert distinct_orders((4, 8, 6)) == (0, 1, 2, 3, 4, 5)
    assert distinct_orders((1, 8, 1)) == (0,)
    assert len(ORDERS) == 6


def test_what_it_refuses():
    x = tokens()
    with pytest.raises(KernelValueError, match="there is no order"):
        reorder_heads(x, codes=[6] * 6, grid=GRID)
    with pytest.raises(KernelValueError, match="has no tokens"):
        reorder_heads(x, codes=[0] * 6, grid=GRID, start=8)
    with pytest.raises(KernelValueError, match="one for each query head"):
        reorder_heads(x, codes=[0] * 4, grid=GRID)
    with pytest.raises(GradientError):
        reorder_heads(x.requires_grad_(), codes=[0] * 6, grid=GRID)
