"""Transposed lists against the block masks they come from."""

from __future__ import annotations

import pytest
import torch

from patchkit.kernels import BlockLayout, ElementRule
from patchkit.kernels.layout.convert import full_mask, scatter_lists
from patchkit.kernels.layout.transpose import transposed


def entries(flat, start, num, at):
    return flat[int(start[at]) : int(start[at]) + int(num[at])].tolist()


@pytest.mark.parametrize("rule", [None, ElementRule(causal_offset=30)], ids=["full", "causal"])
@pytest.mark.parametrize("lens", [None, [300, 170]], ids=["whole", "kv_lens"])
def test_lists_of_every_key_block(rule, lens):
    keep = torch.rand(2, 3, 13, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[:, :, 3] = True
    keep[1, 2] = True
    kv_lens = None if lens is None else torch.tensor(lens)
    layout = BlockLayout.from_bool(keep, block_q=16, block_k=32, q_len=200, kv_len=301, rule=rule, kv_lens=kv_lens)
    lists = transposed(layout)
    assert transposed(layout) is lists
    counts = lists.counts(layout.valid_blocks)
    for b in range(2):
        valid = int(layout.valid_blocks[b if lens else 0])
        for h in range(3):
            complete = layout.kv_num[b, h] == valid
            shared = lists.complete_idx[b, h, : int(lists.complete_num[b, h])].tolist()
            assert shared == complete.nonzero().flatten().tolist()
            full = full_mask(layout, b, h)
            part = torch.zeros_like(full)
            if layout.part_idx is not None:
                part = scatter_lists(layout.part_idx[b, h], layout.part_num[b, h], layout.n_k)
            assert torch.equal(counts[b, h], (full | part).sum(0))
            for j in range(layout.n_k):
                own = entries(lists.full_idx, lists.full_start, lists.full_num, (b, h, j))
                assert own == (full[:, j] & ~complete).nonzero().flatten().tolist()
                if layout.part_idx is None:
                    continue
                rows = entries(lists.part_idx, lists.part_start, lists.part_num, (b, h, j))
                assert rows == part[:, j].nonzero().flatten().tolist()
                slots = entries(lists.part_slot, lists.part_start, lists.part_num, (b, h, j))
                assert all(int(layout.part_idx[b, h, p, s]) == j for p, s in zip(rows, slots, strict=True))


def test_complete_rows_take_one_entry_each():
    """4,096 x 4,096 blocks, all complete: 16 Mi entries if they were listed, 4,096 as they are."""
    n = 4096 * 16
    layout = BlockLayout(
        16, 16, n, n, torch.zeros(1, 1, 4096, 1, dtype=torch.int16), torch.full((1, 1, 4096), 4096, dtype=torch.int32)
    ).validate()
    lists = transposed(layout)
    assert int(lists.full_num.sum()) == 0
    assert lists.complete_idx.numel() == 4096
    assert lists.full_idx.numel() + lists.complete_idx.numel() < 5000


def test_a_layout_that_keeps_nothing():
    layout = BlockLayout.from_bool(torch.zeros(3, 4, dtype=torch.bool), block_q=16, block_k=16, q_len=40, kv_len=64)
    lists = transposed(layout)
    assert not lists.counts(layout.valid_blocks).any()
    assert int(lists.complete_num.sum()) == 0
