"""Every input that does not fit is refused on the host, with a typed error: on a GPU a wrong index reads elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patchkit.kernels import BlockLayout, ElementRule, LayoutError, block_sparse_attention

N = 100


@pytest.fixture
def layout():
    keep = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)
    return BlockLayout.from_bool(keep, block_q=32, block_k=32, q_len=N, kv_len=N)


@pytest.fixture
def partial():
    rule = ElementRule(3, torch.arange(N) // 40, torch.arange(N) // 40)
    return BlockLayout.from_bool(
        torch.ones(4, 4, dtype=torch.bool), block_q=32, block_k=32, q_len=N, kv_len=N, rule=rule
    )


def changed(x, at, value):
    x = x.clone()
    x[at] = value
    return x


BROKEN = {
    "index past the end": lambda a: {"kv_idx": changed(a.kv_idx, (0, 0, 0, 1), 4)},
    "negative index": lambda a: {"kv_idx": changed(a.kv_idx, (0, 0, 0, 0), -1)},
    "index past kv_lens": lambda a: {"kv_lens": torch.tensor([60], dtype=torch.int32)},
    "not ascending": lambda a: {"kv_idx": a.kv_idx.flip(-1)},
    "listed twice": lambda a: {"kv_idx": changed(a.kv_idx, (0, 0, 0, 1), 0)},
    "longer than the list": lambda a: {"kv_num": changed(a.kv_num, (0, 0, 1), 3)},
    "negative count": lambda a: {"kv_num": changed(a.kv_num, (0, 0, 1), -1)},
    "count of a wrong dtype": lambda a: {"kv_num": a.kv_num.long()},
    "index of a wrong dtype": lambda a: {"kv_idx": a.kv_idx.long()},
    "a row too few": lambda a: {"kv_num": a.kv_num[:, :, :3], "kv_idx": a.kv_idx[:, :, :3]},
    "other heads in idx than in num": lambda a: {"kv_idx": a.kv_idx.expand(1, 2, -1, -1)},
    "block size zero": lambda a: {"block_k": 0},
    "kv_lens past the end": lambda a: {"kv_lens": torch.tensor([101], dtype=torch.int32)},
    "float kv_lens": lambda a: {"kv_lens": torch.tensor([100.0])},
    "a rule without partial blocks": lambda a: {"causal_offset": 0},
    "lists on another device": lambda a: {"kv_idx": a.kv_idx.to("meta")},
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_list_is_refused(layout, what):
    q = torch.randn(1, 1, N, 16)
    with pytest.raises(LayoutError, match="BlockLayout"):
        block_sparse_attention(q, q, q, replace(layout, **BROKEN[what](layout)))


BROKEN_PARTS = {
    "index past the end": lambda a: {"part_idx": changed(a.part_idx, (0, 0, 0, 0), 4)},
    "longer than the list": lambda a: {"part_num": a.part_num + 5},
    "idx without num": lambda a: {"part_num": None},
    "full and partial": lambda a: {"kv_idx": a.part_idx, "kv_num": a.part_num},
    "no rule": lambda a: {"causal_offset": None, "q_seg": None, "kv_seg": None},
    "one segment list": lambda a: {"kv_seg": None},
    "segments of another length": lambda a: {"q_seg": torch.zeros(99, dtype=torch.int64)},
    "fractional segments": lambda a: {"q_seg": torch.zeros(100)},
    "bits of another shape": lambda a: {"part_bits": torch.zeros(1, 1, 4, 1, 32, 2, dtype=torch.int64)},
}


@pytest.mark.parametrize("what", BROKEN_PARTS)
def test_a_broken_partial_list_is_refused(partial, what):
    q = torch.randn(1, 1, N, 16)
    with pytest.raises(LayoutError, match="BlockLayout"):
        block_sparse_attention(q, q, q, replace(partial, **BROKEN_PARTS[what](partial)))


def test_segments_for_another_number_of_samples(partial):
    three = replace(partial, q_seg=partial.q_seg.expand(3, N).contiguous()).validate()
    q = torch.randn(2, 1, N, 16)
    with pytest.raises(LayoutError, match="3 samples, the call has 2"):
        block_sparse_attention(q, q, q, three)


def test_validate_false_skips_the_checks(layout, monkeypatch):
    """Shapes and lists alike; the layout is then taken at its word."""
    q = torch.randn(1, 1, N, 16)
    unchecked = replace(layout, kv_idx=layout.kv_idx.clone())
    monkeypatch.setattr("patchkit.kernels.layout.check.check_layout", lambda x: pytest.fail("checked"))
    monkeypatch.setattr("patchkit.kernels.sparse.check_inputs", lambda *a: pytest.fail("checked"))
    out = block_sparse_attention(q, q, q, unchecked, validate=False)
    assert torch.equal(out, block_sparse_attention(q, q, q, layout, validate=False))
