"""Row blocks of 64, two by two: what neighbours both keep goes into one launch with tiles of 128 rows, the rest into
a second one. Plain torch, on the layout's device, once per layout.

With 64 rows a tile of keys feeds half of the products that it feeds with 128, so tensor cores wait for L2. One program
with both accumulators was tried: eight warps have no work for each in a 64-row product (the compiler computes rows
twice or splits them over the warps), and four do not hold 128 rows of D = 128 without spilling. Two launches keep each
tile at its best form; the second resumes where the first ended. No product is computed in vain, and a block that one
row drops never meets that row: NaN in it stays out.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ...layout import BlockLayout
from ...layout.convert import scatter_lists

PAIR_ROWS = 64
# Unmeasured; from counting bytes in 16 bits at D = 128. Handing 64 fp32 rows from one launch to the next writes and
# reads what four tiles of K and V hold. A shared block saves a row half a tile of K and V. So eight shared blocks break
# even, and from twice as many there is something to gain. With overlap o the traffic falls to 1 - o / 2: below a
# quarter that is less than the second launch's own start and end.
PAIR_BLOCKS = 16
PAIR_OVERLAP = 0.25


class Pairs(NamedTuple):
    """Two layouts over disjoint keys whose union is the layout they were made from.

    Args:
        shared: row blocks of 128, the full blocks that both of their halves keep.
        own: row blocks of 64, the other full blocks, and all partial ones.
    """

    shared: BlockLayout
    own: BlockLayout


def pairs_of(layout: BlockLayout) -> Pairs | None:
    """The layout as pairs, if its rows are 64 and overlap enough. Waits for the device, once per layout."""
    if layout.block_q != PAIR_ROWS or layout.n_q < 2:
        return None
    return layout.derived("triton.pairs", lambda: _pairs(layout))


def _pairs(layout: BlockLayout) -> Pairs | None:
    n_pairs = (layout.n_q + 1) // 2
    shared = layout.kv_num.new_empty(layout.batch, layout.heads, n_pairs)
    own = torch.empty_like(layout.kv_num)
    heads = [(b, h) for b in range(layout.batch) for h in range(layout.heads)]
    # Head by head, counting first: one head's Nq x Nk bools are all that is there at a time.
    for b, h in heads:
        shared[b, h], own[b, h] = _counts(layout, b, h, *_shared(layout, b, h))
    implicit_own, implicit_shared = own == layout.valid_blocks, shared == layout.valid_blocks
    figures = (2 * shared.sum(), layout.kv_num.sum(), shared.masked_fill(implicit_shared, 0).max())
    twice, total, wide, long = torch.stack([*figures, own.masked_fill(implicit_own, 0).max()]).tolist()
    if twice < PAIR_OVERLAP * total or twice < 2 * PAIR_BLOCKS * shared.numel():
        return None
    shared_idx = layout.kv_idx.new_empty(*shared.shape, max(1, wide))
    own_idx = layout.kv_idx.new_empty(*own.shape, max(1, long))
    for b, h in heads:
        idx, used, both = _shared(layout, b, h)
        shared_idx[b, h] = _pack(idx[0::2], both[0::2], shared_idx.shape[-1])
        own_idx[b, h] = _pack(idx, used & ~both, own_idx.shape[-1])[: layout.n_q]
    sizes = (layout.block_k, layout.q_len, layout.kv_len)
    first = BlockLayout(2 * PAIR_ROWS, *sizes, shared_idx, shared, kv_lens=layout.kv_lens)
    return Pairs(first, dataclasses.replace(layout, kv_idx=own_idx, kv_num=own))


def _shared(layout: BlockLayout, b: int, h: int) -> tuple[Tensor, Tensor, Tensor]:
    """One head, its rows padded to an even number: idx (R, K), which entries count, and which the other row has too.

    A complete row beside one that is not counts nothing here: its list is implicit, and such pairs are few.
    """
    spare = layout.n_q % 2
    idx = torch.nn.functional.pad(layout.kv_idx[b, h], (0, 0, 0, spare)).to(torch.int32)
    num, complete = layout.kv_num[b, h], layout.valid_blocks[b if layout.valid_blocks.shape[0] > 1 else 0].view(())
    stored = torch.nn.functional.pad(num.masked_fill(num == complete, 0), (0, spare))
    used = torch.arange(idx.shape[1], device=idx.device) < stored.unsqueeze(-1)
    neighbour = scatter_lists(idx, stored, layout.n_k).view(-1, 2, layout.n_k).flip(1).flatten(0, 1)
    both = neighbour.gather(1, idx.masked_fill(~used, 0).to(torch.int64)) & used
    return idx, used, both


def _counts(layout: BlockLayout, b: int, h: int, idx: Tensor, used: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    """Shared (Np,) and own (Nq,) counts of one head; two complete rows share all, one alone keeps its own list."""
    num, complete = layout.kv_num[b, h], layout.valid_blocks[b if layout.valid_blocks.shape[0] > 1 else 0].view(())
    whole = torch.nn.functional.pad(num == complete, (0, idx.shape[0] - layout.n_q)).view(-1, 2).all(1)
    shared = torch.where(whole, complete, both[0::2].sum(-1, dtype=torch.int32))
    return shared, num - shared.repeat_interleave(2)[: layout.n_q]


def _pack(idx: Tensor, keep: Tensor, width: int) -> Tensor:
    """The kept entries of each row of idx (R, K) moved to the front, still ascending: (R, width)."""
    slot = torch.where(keep, keep.cumsum(-1) - 1, width)
    out = idx.new_zeros(idx.shape[0], width + 1)
    return out.scatter_(1, slot.clamp(max=width), idx)[:, :width]
