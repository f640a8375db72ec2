"""Row top-k in plain torch, against sorting; and what the public operator accepts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchkit.kernels import GradientError, KernelTypeError, KernelValueError
from patchkit.kernels.topk import blocked, row_topk
from patchkit.kernels.topk.reference import NAN, NEVER, sort_keys

KS = [0, 1, 5, 36, 37, 99, torch.tensor([[3, 36]]), torch.tensor([0, 99]), torch.tensor(4)]


@pytest.mark.parametrize("k", KS, ids=str)
def test_awkward_rows(check_topk, awkward_scores, k):
    check_topk(row_topk, awkward_scores(1, 2, 4, 37), k)


@pytest.mark.parametrize("k", [0, 2, torch.tensor([[1, 9], [9, 0]])], ids=str)
def test_forced_lengths_and_numbering(check_topk, awkward_scores, k):
    forced = torch.rand(2, 1, 5, 20, generator=torch.Generator().manual_seed(3)) < 0.2
    forced[0, 0, 2], forced[1, 0, 3] = True, False
    scores = awkward_scores(2, 2, 5, 20)
    for extra in ({}, {"valid": torch.tensor([20, 9])}, {"valid": torch.tensor([0, 20]), "first": 7}):
        check_topk(row_topk, scores, k, **extra)
        check_topk(row_topk, scores, k, forced=forced, **extra)
        check_topk(row_topk, scores, k, forced=forced[0, 0], width=4, **extra)


@pytest.mark.parametrize("k", [2, torch.tensor([[1, 9], [30, 0]])], ids=str)
def test_the_way_without_host_reads(check_topk, awkward_scores, monkeypatch, k):
    """What an accelerator takes where the kernel does not apply; on a CPU it is for forced entries only."""
    forced, valid = torch.zeros(1, 20, dtype=torch.bool), torch.tensor([20, 9])
    monkeypatch.setattr(blocked, "_even", None)
    check_topk(row_topk, awkward_scores(2, 2, 5, 20), k, forced=forced)
    check_topk(row_topk, awkward_scores(2, 2, 5, 20), k, forced=forced, valid=valid)


def test_rows_in_several_pieces(check_topk, awkward_scores, monkeypatch):
    monkeypatch.setattr(blocked, "CHUNK", 64)
    check_topk(row_topk, awkward_scores(1, 2, 11, 30), 6)
    check_topk(row_topk, awkward_scores(1, 2, 11, 30), 6, forced=torch.rand(11, 30) < 0.1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(0, 20), levels=st.sampled_from([1, 2, 5, 1000]))
def test_masses_with_many_ties(check_topk, seed, k, levels):
    scores = torch.randint(0, levels, (1, 2, 3, 17), generator=torch.Generator().manual_seed(seed)).float()
    check_topk(row_topk, scores, k)


def test_long_lists_take_int32(check_topk):
    scores = torch.rand(1, 1, 2, 33_000, generator=torch.Generator().manual_seed(0))
    idx, _ = row_topk(scores, 3)
    assert idx.dtype == torch.int32
    check_topk(row_topk, scores, 3)
    assert row_topk(scores[..., :100], 3)[0].dtype == torch.int16
    assert row_topk(scores[..., :100], 3, first=32_700)[0].dtype == torch.int32


def test_keys_are_in_the_order_of_the_scores():
    inf, nan = float("inf"), float("nan")
    ordered = torch.tensor([nan, -inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 3e38, inf])
    keys = sort_keys(ordered).tolist()
    assert keys == sorted(set(keys))
    assert keys[0] == NAN > NEVER
    assert sort_keys(torch.tensor([-0.0])).tolist() == sort_keys(torch.tensor([0.0])).tolist()
    assert sort_keys(torch.tensor([-nan])).tolist() == [NAN]


def test_leading_dimensions_and_no_rows():
    scores = torch.rand(3, 4, 6)
    for lead in ((3, 4), (4,)):
        idx, num = row_topk(scores if len(lead) == 2 else scores[0], 2)
        assert idx.shape == (*lead, 2)
        assert num.shape == lead
    assert row_topk(torch.rand(1, 2, 0, 5), 2)[0].shape == (1, 2, 0, 2)
    assert row_topk(torch.rand(1, 2, 3, 0), 2)[1].tolist() == [[[0] * 3] * 2]


def test_under_fake_tensors_and_compile():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for extra in ({}, {"forced": torch.ones(3, 50, dtype=torch.bool)}, {"width": 3}):
        real = row_topk(torch.rand(2, 3, 50), 7, **extra)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = row_topk(torch.rand(2, 3, 50), 7, **extra)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_bad_input_is_refused():
    scores = torch.rand(2, 3, 4, 5)
    for error, words, call in [
        (KernelValueError, "scores", lambda: row_topk(scores[0, 0, 0], 1)),
        (KernelTypeError, "floating", lambda: row_topk(scores.long(), 1)),
        (KernelTypeError, "k is", lambda: row_topk(scores, torch.tensor(0.5))),
        (KernelValueError, "broadcast", lambda: row_topk(scores, torch.ones(2, 2, dtype=torch.int64))),
        (KernelValueError, "k_max", lambda: row_topk(scores, 1, -1)),
        (KernelTypeError, "valid", lambda: row_topk(scores, 1, valid=torch.ones(2))),
        (KernelValueError, "per sample", lambda: row_topk(scores, 1, valid=torch.ones(3, dtype=torch.int32))),
        (KernelTypeError, "forced", lambda: row_topk(scores, 1, forced=torch.ones(4, 5))),
        (KernelValueError, "forced", lambda: row_topk(scores, 1, forced=torch.ones(4, 4, dtype=torch.bool))),
        (KernelValueError, "width", lambda: row_topk(scores, 1, width=0)),
        (GradientError, "scores", lambda: row_topk(scores.clone().requires_grad_(), 1)),
    ]:
        with pytest.raises(error, match=words):
            call()
