"""Exchange with FlexAttention's ``BlockMask`` (torch.nn.attention.flex_attention), imported only when used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .build import stack_lists
from .convert import full_mask, scatter_lists

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from .block_layout import BlockLayout


def _dense_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(Nq, Nk) bool to flex's form: indices (Nq, Nk) int32 with the kept ones first, and counts."""
    order = torch.sort(~mask, dim=-1, stable=True).indices
    return order.to(torch.int32), mask.sum(-1, dtype=torch.int32)


def to_flex(layout: BlockLayout) -> BlockMask:
    """See :meth:`BlockLayout.to_flex`. Blocks cut by the end of the keys become partial with a length test."""
    from torch.nn.attention.flex_attention import BlockMask

    full, part, whole_blocks, some_blocks = [], [], [], []
    lens = layout.kv_lens
    shortest = layout.kv_len if lens is None else int(lens.min())
    for b in range(layout.batch):
        for h in range(layout.heads):
            whole = full_mask(layout, b, h)
            some = torch.zeros_like(whole)
            if layout.part_idx is not None and layout.part_num is not None:
                some = scatter_lists(layout.part_idx[b, h], layout.part_num[b, h], layout.n_k)
            whole_blocks.append(whole.clone())
            some_blocks.append(some.clone())
            cut = shortest // layout.block_k
            if shortest < layout.kv_len:
                some[:, cut:] |= whole[:, cut:]
                whole[:, cut:] = False
            full.append(_dense_lists(whole))
            part.append(_dense_lists(some))
    shape = (layout.batch, layout.heads)
    full_idx, full_num = stack_lists(full, layout.batch, layout.heads)
    part_idx, part_num = stack_lists(part, layout.batch, layout.heads)
    return BlockMask.from_kv_blocks(
        part_num,
        part_idx,
        full_num,
        full_idx,
        BLOCK_SIZE=(layout.block_q, layout.block_k),
        mask_mod=_mask_mod(layout, *(torch.stack(x).unflatten(0, shape) for x in (whole_blocks, some_blocks))),
        seq_lengths=(layout.q_len, layout.kv_len),
        compute_q_blocks=False,
    )


def _mask_mod(layout: BlockLayout, full: Tensor, part: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The element mask as a function of the position. full, part: (B', H', Nq, Nk) bool, blocks of either kind.

    Compiled, flex asks it in partial blocks only; eager, it knows no blocks and asks it everywhere, so it has to know
    them itself. Nothing quadratic in tokens is stored, except where the layout has stored bits.
    """
    if layout.part_bits is not None:
        elements = layout.element_mask()

        def stored(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return elements[b * (elements.shape[0] > 1), h * (elements.shape[1] > 1), q, k]

        return stored
    block_q, block_k, offset, lens = layout.block_q, layout.block_k, layout.causal_offset, layout.kv_lens
    by_sample, by_head = int(layout.batch > 1), int(layout.heads > 1)
    q_seg, kv_seg = (None if x is None else x.view(-1, x.shape[-1]) for x in (layout.q_seg, layout.kv_seg))

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at = b * by_sample, h * by_head, q // block_q, k // block_k
        some = part[at]
        if offset is not None:
            some = some & (k <= q + offset)
        if q_seg is not None and kv_seg is not None:
            own = q_seg[b * int(q_seg.shape[0] > 1), q]
            some = some & (own == kv_seg[b * int(kv_seg.shape[0] > 1), k]) & (own >= 0)
        seen = full[at] | some
        return seen if lens is None else seen & (k < lens[b * int(lens.shape[0] > 1)])

    return rule


def from_flex(block_mask: BlockMask) -> BlockLayout:
    """See :meth:`BlockLayout.from_flex`."""
    from .block_layout import BlockLayout

    block_q, block_k = block_mask.BLOCK_SIZE
    q_len, kv_len = block_mask.seq_lengths
    num = block_mask.kv_num_blocks
    batch, heads, n_q = num.shape
    n_k = -(-kv_len // block_k)

    def grid(idx: Tensor | None, count: Tensor | None) -> Tensor:
        if idx is None or count is None:
            return torch.zeros(batch, heads, n_q, n_k, dtype=torch.bool, device=num.device)
        return scatter_lists(idx.flatten(0, 2), count.flatten(), n_k).view(batch, heads, n_q, n_k)

    some = grid(block_mask.kv_indices, num)
    whole = grid(block_mask.full_kv_indices, block_mask.full_kv_num_blocks)

    def element(b: Tensor, h: Tensor, i: Tensor, n: Tensor) -> Tensor:
        p, j = i // block_q, n // block_k
        return (block_mask.mask_mod(b, h, i, n) & some[b, h, p, j]) | whole[b, h, p, j]

    return BlockLayout.from_mask_mod(
        element,
        block_q=block_q,
        block_k=block_k,
        q_len=q_len,
        kv_len=kv_len,
        batch=batch,
        heads=heads,
        device=num.device,
    )
