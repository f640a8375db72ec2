"""What a layout has derived is found again inside the custom op, eager and compiled, and never under a wrong layout."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle

import pytest
import torch

from patchkit.kernels import BlockLayout, LayoutError, block_sparse_attention, sparse
from patchkit.kernels.layout.recall import recall


def make(seed: int = 0) -> BlockLayout:
    keep = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) < 0.5
    return BlockLayout.from_bool(keep, block_q=16, block_k=16, q_len=64, kv_len=64)


def test_the_op_sees_the_callers_layout(monkeypatch):
    layout, seen = make(), []
    original = sparse.block_sparse_blocked

    def spy(q, k, v, got, *rest):
        seen.append(got is layout)
        return original(q, k, v, got, *rest)

    monkeypatch.setattr(sparse, "block_sparse_blocked", spy)
    q = torch.randn(1, 2, 64, 8)
    block_sparse_attention(q, q, q, layout)
    for backend in ("eager", "aot_eager"):
        torch.compile(lambda q: block_sparse_attention(q, q, q, layout), backend=backend, fullgraph=True)(q)
    assert seen == [True, True, True]


def test_a_layout_that_differs_in_anything_is_not_mistaken_for_it():
    layout = make()
    for change in (
        {"kv_idx": layout.kv_idx.clone()},
        {"q_len": 63},
        {"kv_lens": torch.tensor([64], dtype=torch.int32)},
    ):
        other = dataclasses.replace(layout, **change)
        assert recall(other) is other
    assert recall(dataclasses.replace(layout)) is layout
    assert layout.to("cpu") is layout


def test_derived_things_are_made_once_and_die_with_the_layout():
    layout, calls = make(), []
    assert layout.derived("x", lambda: calls.append(1) or 7) == 7
    assert layout.derived("x", lambda: calls.append(1) or 8) == 7
    assert calls == [1]
    bare = dataclasses.replace(layout)
    del layout
    gc.collect()
    assert recall(bare) is bare


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), dataclasses.replace])
def test_copies_keep_what_they_derive_and_do_not_take_it_from_the_original(copied):
    layout = make()
    q = torch.randn(1, 2, 64, 8)
    block_sparse_attention(q, q, q, layout)
    other = copied(layout)
    assert "_derived" not in other.__dict__
    for each in (other, layout, other):
        expected = block_sparse_attention(q, q, q, each)
        made = dict(each.__dict__["_derived"])
        assert torch.equal(block_sparse_attention(q, q, q, each), expected)
        assert made.items() == each.__dict__["_derived"].items()


def test_lengths_are_the_layouts_own():
    lengths = torch.tensor([64], dtype=torch.int32)
    keep = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    layout = BlockLayout.from_bool(keep, block_q=16, block_k=16, q_len=64, kv_len=64, kv_lens=lengths)
    lengths.fill_(3)
    assert layout.kv_lens.tolist() == [64]


def test_an_unchecked_list_that_leads_nowhere_is_an_error():
    layout = make()
    bad = dataclasses.replace(layout, kv_idx=torch.full_like(layout.kv_idx, 100), kv_num=torch.ones_like(layout.kv_num))
    q = torch.randn(1, 2, 64, 8)
    with pytest.raises(LayoutError, match="100"):
        block_sparse_attention(q, q, q, bad, validate=False)
