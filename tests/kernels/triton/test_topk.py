"""The Triton row top-k, interpreted, against sorting."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def by_kernel(monkeypatch, on_triton):
    """``row_topk`` on CPU tensors through the interpreted kernel, into buffers full of nonsense."""
    from patchkit.kernels.topk import row_topk, triton

    calls, empty, kernel = [], torch.empty, triton.row_topk_triton
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(-77))
    monkeypatch.setattr(triton, "row_topk_triton", lambda *a: calls.append(1) or kernel(*a))
    yield row_topk
    assert calls


def test_awkward_rows(by_kernel, check_topk, awkward_scores):
    check_topk(by_kernel, awkward_scores(1, 2, 4, 37), torch.tensor([[3, 36]]))


@pytest.mark.parametrize("k", [0, 1, 20, 21, 99])
def test_every_budget(by_kernel, check_topk, awkward_scores, k):
    check_topk(by_kernel, awkward_scores(1, 1, 3, 21), k)


def test_samples_of_different_lengths(by_kernel, check_topk, awkward_scores):
    check_topk(by_kernel, awkward_scores(3, 2, 2, 40), 7, valid=torch.tensor([40, 11, 0]))


def test_forced_blocks_come_on_top(by_kernel, check_topk, awkward_scores):
    forced = torch.zeros(3, 30, dtype=torch.bool)
    forced[:, 25:], forced[2] = True, True
    check_topk(by_kernel, awkward_scores(1, 2, 3, 30), torch.tensor([2, 29]), forced=forced)
    check_topk(by_kernel, awkward_scores(2, 1, 3, 30), 4, forced=forced, valid=torch.tensor([30, 27]), width=9)


def test_numbering_views_and_narrow_lists(by_kernel, check_topk, awkward_scores):
    whole = awkward_scores(1, 2, 6, 50)
    check_topk(by_kernel, whole[..., 1:5, 3:40], 5, first=3)
    check_topk(by_kernel, whole.half()[..., :3, :], 20, width=6)


def test_a_row_of_a_long_video(by_kernel, check_topk):
    row = torch.rand(1, 1, 1, 1857, generator=torch.Generator().manual_seed(0)).square()
    check_topk(by_kernel, row, 371)


def test_a_bound_below_the_budget_counts(by_kernel):
    scores = torch.arange(12.0).view(1, 12)
    idx, num = by_kernel(scores, torch.tensor(9), 4)
    assert (idx.tolist(), num.tolist()) == ([[8, 9, 10, 11]], [4])


def test_rows_that_are_too_long_go_the_other_way(on_triton, monkeypatch, check_topk):
    from patchkit.kernels.topk import row_topk, triton

    monkeypatch.setattr(triton, "row_topk_triton", None)
    check_topk(row_topk, torch.rand(1, 1, 2, 8193, generator=torch.Generator().manual_seed(0)), 9)
    check_topk(row_topk, torch.rand(1, 1, 5, 7, generator=torch.Generator().manual_seed(0)).transpose(2, 3), 3)
